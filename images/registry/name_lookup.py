"""Resolves names of registries, so that a name server that does not answer delays only its own pull."""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import suppress
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult

_NUMERIC = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV


class NameLookup(AbstractResolver):
    """Resolves each name in its own thread, which is abandoned when the pull ends.

    getaddrinfo(3) cannot be interrupted, and may take 30 seconds if the name server does not answer. With threads that
    all pulls share, a few such names would delay other pulls and the end of the agent.
    """

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """The addresses of ``host``. OSError (socket.gaierror) if there are none."""
        loop = asyncio.get_running_loop()
        found: asyncio.Future[list[Any]] = loop.create_future()

        def look_up() -> None:
            addresses: list[Any] = []
            error: Exception | None = None
            try:
                kind, flags = socket.SOCK_STREAM, socket.AI_ADDRCONFIG
                addresses = socket.getaddrinfo(host, port, family=family, type=kind, flags=flags)
            except (OSError, UnicodeError) as failure:
                error = failure
            with suppress(RuntimeError):  # the loop is closed because the agent has ended
                loop.call_soon_threadsafe(_settle, found, addresses, error)

        threading.Thread(target=look_up, name="name-lookup", daemon=True).start()
        return [_result(host, *one) for one in await found]

    async def close(self) -> None:
        """Do nothing: this resolver holds no resources."""


def _settle(found: asyncio.Future[list[Any]], addresses: list[Any], error: Exception | None) -> None:
    if found.done():
        return
    if error is not None:
        found.set_exception(error)
    else:
        found.set_result(addresses)


def _result(name: str, family: int, _: int, proto: int, __: str, address: tuple[Any, ...]) -> ResolveResult:
    host = str(address[0])
    if family == socket.AF_INET6 and address[3] and "%" not in host:  # a link-local address
        host = f"{host}%{address[3]}"
    return ResolveResult(hostname=name, host=host, port=address[1], family=family, proto=proto, flags=_NUMERIC)
