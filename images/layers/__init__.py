"""Unpacked layers: fetched, made and kept."""
