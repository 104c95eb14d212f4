"""Checks whether an image is trusted."""
