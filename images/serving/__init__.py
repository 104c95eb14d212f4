"""Serves the images of this node to other nodes, with the read-only part of the OCI distribution API."""
