"""Measures a CRI server over its socket, beside a bare OCI runtime and a peer; run as ``python -m tests.bench``."""
