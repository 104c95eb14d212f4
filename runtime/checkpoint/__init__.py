"""Checkpoints: a container is frozen, written to an archive, and continues. A container is restored from an archive."""
