"""A call that is cancelled while it writes to the database: memory and database agree, and nothing is left behind."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.integration.images.conftest import Node
from tests.support.image_builder import BuiltImage, entry, make_tar

T = TypeVar("T")

IMAGE = BuiltImage((make_tar([entry("a", "a")]), make_tar([entry("b", "b")])))
NAME = "registry.example/app:v1"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    IMAGE.write_oci(tmp_path / "image.tar", NAME)
    return tmp_path / "image.tar"


async def cancelled_at_write(
    node: Node, number: int, call: Coroutine[Any, Any, object], patch: pytest.MonkeyPatch
) -> bool:
    """Run ``call`` and cancel it when it begins its write ``number``. Returns False if it has fewer."""
    begun = 0
    client = asyncio.ensure_future(call)
    write = node.database.write

    async def cancelling(work: Callable[[sqlite3.Connection], T]) -> T:
        nonlocal begun
        begun += 1
        if begun == number:
            client.cancel()
        return await write(work)

    with patch.context() as patched:
        patched.setattr(node.database, "write", cancelling)
        await asyncio.wait((client,))
    assert client.cancelled() == (begun >= number)
    return begun >= number


async def assert_memory_is_as_after_a_restart(node: Node) -> None:
    images, usage = sorted(node.store.images(), key=lambda image: image.id), node.store.filesystem_usage()
    await node.images.emptied()
    await node.restart()
    assert sorted(node.store.images(), key=lambda image: image.id) == images
    assert node.store.filesystem_usage() == usage


Operation = Callable[[Node, Path], Awaitable[object]]
OPERATIONS: dict[str, Operation] = {
    "import": lambda node, archive: node.puller.import_archive(archive),
    "tag": lambda node, _: node.store.tag(NAME, "registry.example/app:v2"),
    "digest": lambda node, _: node.store.add_digest(node.store.get(NAME), f"registry.example/b@sha256:{'b' * 64}"),
    "remove": lambda node, _: node.store.remove(NAME),
    "snapshot": lambda node, _: snapshot(node),
}


async def snapshot(node: Node) -> None:
    await node.snapshots.prepare("c", node.store.get(NAME), target=node.target("c"))
    await node.snapshots.unmount("c", node.target("c"))
    await node.snapshots.remove("c")


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_a_call_is_cancelled_at_each_of_its_writes(
    node: Node, archive: Path, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        await OPERATIONS[operation](node, archive)

    number, again = 0, True
    while again:
        number += 1
        if operation != "import":
            await node.puller.import_archive(archive)
        again = await cancelled_at_write(node, number, run(), monkeypatch)
        await node.snapshots.unmount("c", node.target("c"))
        await node.snapshots.remove("c")
        await assert_memory_is_as_after_a_restart(node)
        await node.store.remove(NAME)
        assert await node.leftovers() == {}, f"cancelled at write {number}"
    assert number > 1
