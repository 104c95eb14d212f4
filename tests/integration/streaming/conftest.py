from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from cri.streaming.limits import StreamLimits
from cri.streaming.server import StreamingServer
from tests.integration.streaming.local_backend import LocalBackend
from tests.integration.streaming.spdy_client import SpdyClient

Connect = Callable[..., Awaitable[SpdyClient]]


@pytest.fixture
def backend() -> LocalBackend:
    return LocalBackend()


@pytest.fixture
async def server(backend: LocalBackend) -> AsyncIterator[StreamingServer]:
    server = StreamingServer(backend, StreamLimits())
    await server.start()
    yield server
    await server.close()
    assert not backend.running, "processes outlive their streams"


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    clients: list[SpdyClient] = []

    async def open_client(url: str, *arguments: Any, **options: Any) -> SpdyClient:
        clients.append(await SpdyClient.connect(url, *arguments, **options))
        return clients[-1]

    yield open_client
    for client in clients:
        await client.close()
