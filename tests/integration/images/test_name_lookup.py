"""A registry whose name server does not answer does not delay pulls from other registries."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from host.errors import KubeletReasonError
from tests.integration.images.conftest import Node
from tests.support.agent import SOON
from tests.support.image_builder import BuiltImage, entry, make_tar
from tests.support.registry import Registry

NewNode = Callable[..., Awaitable[Node]]

SILENT = [f"registry{number}.silent.test:80" for number in range(40)]
QUICK = "quick.test"


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Name servers that do not answer for silent.test, and that resolve QUICK to this machine."""
    given_up = threading.Event()
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, *arguments: Any, **options: Any) -> Any:
        if str(host).endswith(".silent.test"):
            given_up.wait(60)
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return real("127.0.0.1" if host == QUICK else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield
    given_up.set()


async def test_unanswered_names_do_not_delay_pulls_from_other_registries(
    new_node: NewNode, registry: Registry, names: None
) -> None:
    image = BuiltImage((make_tar([entry("file", "content")]),))
    registry.push(image, "names/quick")
    quick = f"{QUICK}:{registry.host.rpartition(':')[2]}"
    node = await new_node(connect_seconds=2.0, stall_seconds=1.0, attempts=1, insecure_registries=(*SILENT, quick))
    silent = [asyncio.create_task(node.puller.pull(f"{host}/image")) for host in SILENT]
    await asyncio.sleep(0)
    async with asyncio.timeout(SOON):
        assert (await node.puller.pull(f"{quick}/names/quick")).id == image.id
        for task in silent[::2]:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, KubeletReasonError):
                await task
        for task in silent[1::2]:
            with pytest.raises(KubeletReasonError, match="no answer in time"):
                await task
