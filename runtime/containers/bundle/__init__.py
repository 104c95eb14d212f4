"""What a container is made from: its mounts, its log and its spec."""
