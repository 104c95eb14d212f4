"""Checkpoints: containers are frozen, written to an archive, and continue; and are restored from one."""
