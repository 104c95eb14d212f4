"""Blobs before they are in the store: sources, partial downloads, progress, slots, removal."""
