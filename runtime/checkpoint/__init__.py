"""Checkpoints: containers frozen, written to an archive, and let run on; and containers restored from one."""
