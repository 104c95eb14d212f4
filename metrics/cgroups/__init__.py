"""What the kernel counts for each cgroup, version 1 and 2."""
