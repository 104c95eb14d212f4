"""Merges the answers of plugins. Each field has one owner."""
