"""Namespaces that pods share and how they are kept."""
