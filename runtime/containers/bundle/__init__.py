"""The parts of a container's bundle: its mounts, its log and its spec."""
