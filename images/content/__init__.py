"""Blobs before they are in the store (sources, ingests, progress, slots), and the removal of files."""
