"""Commands about checkpoints of containers and pods."""
