"""Restoring a container from a checkpoint, with the rights of its new configuration and no others."""
