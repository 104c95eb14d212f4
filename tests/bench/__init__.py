"""Measures a CRI server through its socket, and for comparison a bare OCI runtime and another CRI server.

Run it as ``python -m tests.bench``.
"""
