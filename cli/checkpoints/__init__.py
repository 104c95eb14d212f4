"""Commands about checkpoints of containers."""
