"""Partial pulls: puts a layer together from kept layers and from the parts of it that are missing."""
