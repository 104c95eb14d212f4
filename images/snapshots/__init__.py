"""Snapshots: the root file systems of containers, made of image layers and a writable layer."""
