"""Files, folders, mounts and /proc, opened by descriptors and read within limits."""
