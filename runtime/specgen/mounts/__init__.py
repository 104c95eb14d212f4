"""Mounts in config.json, with every path resolved inside the image's root."""
