"""Ports of the node for tests."""

from __future__ import annotations

import itertools
import secrets
import socket

# Below the kernel's range for outgoing connections, so that no connection uses a port before its test.
_FIRST, _COUNT = 24_000, 7_000
_numbers = itertools.count(secrets.randbelow(_COUNT))


def free_port() -> int:
    """A port on which no TCP or UDP socket listens. Each call returns another one."""
    while True:
        port = _FIRST + next(_numbers) % _COUNT
        try:
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                with socket.socket(socket.AF_INET, kind) as probe:
                    probe.bind(("", port))
        except OSError:
            continue
        return port
