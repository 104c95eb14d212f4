"""Reads the kernel's counters of cgroups, version 1 and 2."""
