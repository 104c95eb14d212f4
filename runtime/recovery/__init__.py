"""The start of the agent: it compares records, processes and leftovers, and repairs the differences."""
