"""A disk that becomes full during a pull fails that pull and no other."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec.structs import force_setattr

from host import libc
from host.errors import LimitError, NoSpaceError
from host.files import mounts
from images.options import ImageOptions
from tests.integration.images.conftest import Node
from tests.support.image_builder import BuiltImage, entry, make_tar
from tests.support.registry import Registry
from tests.support.registry_front import run_front
from tests.support.waiting import until

SIZE = 24 << 20


@pytest.fixture
async def small_node(tmp_path: Path) -> AsyncIterator[Node]:
    small = tmp_path / "small"
    small.mkdir()
    libc.mount("tmpfs", str(small), "tmpfs", 0, f"size={SIZE}")
    node = Node(small / "node", ImageOptions(registry_config_dir=str(tmp_path / "certs.d")))
    await node.start()
    try:
        yield node
    finally:
        await node.stop()
        mounts.unmount(small)


def free(node: Node) -> int:
    status = os.statvfs(node.root)
    return status.f_bavail * status.f_frsize


async def test_a_full_disk_does_not_fail_other_pulls(small_node: Node, registry: Registry) -> None:
    node = small_node
    base = make_tar([entry("base", os.urandom(200_000))])
    big = BuiltImage((base, make_tar([entry("big", b"compressible " * (SIZE // 8))])))
    others = [BuiltImage((base, make_tar([entry("other", f"{number}")]))) for number in range(6)]
    name = registry.push(big, "full/big")
    names = [registry.push(built, f"full/other{number}") for number, built in enumerate(others)]
    before = free(node)
    pulling = asyncio.create_task(node.puller.pull(name))
    started = asyncio.Event()
    asyncio.get_running_loop().call_later(0.02, started.set)
    await started.wait()
    # A pull that finds the disk full itself may fail too, but succeeds when it is tried again.
    results = await asyncio.gather(*map(node.puller.pull, names), return_exceptions=True)
    failed = [result for result in results if isinstance(result, BaseException)]
    assert [error for error in failed if not isinstance(error, LimitError)] == []
    with pytest.raises(LimitError, match=r"disk is full|No space left") as caught:
        await pulling
    assert "full/big" in caught.value.message
    await node.images.emptied()
    for built, again in zip(others, names, strict=True):
        image = await node.puller.pull(again)
        assert image.id == built.id
        assert (node.data / "layers" / str(image.layers[0]) / "fs/base").stat().st_size == 200_000
    assert (await node.checker.check(repair=False)).findings == ()
    for built in others:
        await node.store.remove(built.id)
    await node.images.emptied()
    assert before - free(node) < 1 << 20, "all that the failed pull took is free again"
    left = await node.leftovers()
    left.pop("mounts", None)
    assert left == {}


async def test_a_pull_that_cannot_fit_is_refused_before_it_fetches(small_node: Node, registry: Registry) -> None:
    node = small_node
    taken = BuiltImage((make_tar([entry("file", os.urandom(5 << 20))]),))
    kept = await node.puller.pull(registry.push(taken, "full/kept"))
    big = BuiltImage((make_tar([entry("big", os.urandom(SIZE // 2))]),))
    name = registry.push(big, "full/twice")
    async with run_front(registry.host) as front:
        with pytest.raises(NoSpaceError, match=r"twice\S* does not fit .* needs at least 2517\d{4} bytes.*min_free"):
            await node.puller.pull(name.replace(registry.host, front.host))
        assert not [path for path in front.count() if "/blobs/" in path and big.id not in path]
    # What is being deleted counts as free: with its compressed layer, this image needs nearly the whole disk.
    small = BuiltImage((make_tar([entry("big", os.urandom(SIZE // 3))]),))
    await node.store.remove(kept.id)
    image = await node.puller.pull(registry.push(small, "full/fits"))
    await node.store.remove(image.id)


async def test_a_pull_ends_as_soon_as_less_than_min_free_is_left(small_node: Node, registry: Registry) -> None:
    node = small_node
    force_setattr(node.options, "min_free", "8MiB")
    name = registry.push(BuiltImage((make_tar([entry("big", os.urandom(4 << 20))]),)), "full/slow")
    async with run_front(registry.host) as front:
        front.trickle = 16384
        pulling = asyncio.create_task(node.puller.pull(name.replace(registry.host, front.host)))
        await until(lambda: node.puller.pulls() and any(layer.received for layer in node.puller.pulls()[0].layers))
        other = node.root.parent / "other"
        other.write_bytes(bytes(free(node) - (7 << 20)))
        with pytest.raises(NoSpaceError, match=r"slow.* does not fit on the disk: .* must stay free"):
            await pulling
    other.unlink()
    assert (await node.puller.pull(name)).id
    await node.images.emptied()


async def test_a_row_left_by_a_full_disk_does_not_prevent_a_pull(small_node: Node, registry: Registry) -> None:
    node = small_node
    name = registry.push(BuiltImage((make_tar([entry("file", b"content")]),)), "full/kept")
    image = await node.puller.pull(name)
    row = node.database.read("SELECT * FROM layers WHERE chain_id = ?", image.chain_ids)[0]
    await node.store.remove(image.id)
    # The state after the disk was too full to delete the row.
    await node.database.execute(f"INSERT INTO layers VALUES ({', '.join('?' * len(row))})", row)
    again = await node.puller.pull(name)
    assert (node.data / "layers" / str(again.layers[0]) / "fs/file").read_bytes() == b"content"
