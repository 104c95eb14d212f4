"""Connections to a pod's own loopback, made in its network namespace without a helper process."""

from __future__ import annotations

import asyncio
import os
import socket
from functools import partial
from pathlib import Path

from host import libc
from host.concurrency.threads import acquired, in_fresh_thread, inside_namespace
from host.errors import NotFoundError, UnavailableError

_ADDRESSES = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))
_CONNECT_SECONDS = 10.0


async def connect_to_pod(sandbox_id: str, port: int, namespace: Path | None) -> socket.socket:
    """A non-blocking TCP socket connected to the port on the pod's IPv4 loopback, else on its IPv6 one.

    ``namespace`` is where the pod's network namespace is pinned, None for a pod on the node's network. A socket belongs
    permanently to the namespace it was made in, so only its making needs a thread that enters it.

    Raises UnavailableError when nothing listens, NotFoundError when the namespace is gone.
    """
    failures = []
    for family, address in _ADDRESSES:
        try:
            return await _connect(family, address, port, namespace)
        except TimeoutError:
            failures.append(f"{address}: no answer in {_CONNECT_SECONDS:g} s")
        except FileNotFoundError as error:
            raise NotFoundError(f"pod sandbox {sandbox_id} has no network namespace any more") from error
        except OSError as error:
            failures.append(f"{address}: {os.strerror(error.errno) if error.errno else error}")
    where = f"localhost:{port} inside pod sandbox {sandbox_id}"
    raise UnavailableError(f"failed to connect to {where}: {', '.join(failures)}")


async def _connect(family: int, address: str, port: int, namespace: Path | None) -> socket.socket:
    if namespace is None:
        connection = _make_socket(family)
    else:
        connection = await acquired(in_fresh_thread, partial(_make_socket_in, family, namespace), socket.socket.close)
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        async with asyncio.timeout(_CONNECT_SECONDS):
            await asyncio.get_running_loop().sock_connect(connection, (address, port))
    except BaseException:
        connection.close()
        raise
    return connection


def _make_socket(family: int) -> socket.socket:
    return socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)


def _make_socket_in(family: int, namespace: Path) -> socket.socket:
    with inside_namespace(str(namespace), libc.CLONE_NEWNET):
        return _make_socket(family)
