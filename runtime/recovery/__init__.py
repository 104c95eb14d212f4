"""The start of the agent: it compares the store with processes, the kernel and folders, and repairs differences."""
