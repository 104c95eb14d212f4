"""Restores a container from a checkpoint, with only the rights of its new configuration."""
