"""Blobs on their way into the store: sources, partial downloads, progress, slots, removal."""
