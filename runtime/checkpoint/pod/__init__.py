"""Checkpoints of whole pods: several containers that are frozen at the same time, in one folder (KEP-5823)."""
