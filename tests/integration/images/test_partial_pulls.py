"""An update of an image fetches only what the node lacks, and is in everything else the image of a whole pull."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web

from images.chunked import partial
from images.image import Image
from images.oci.digests import digest_of
from tests.integration.images.conftest import Node
from tests.support.chunked import ChunkedImage, ChunkedLayer, chunked_image, estargz_image
from tests.support.image_builder import entry, folder, make_tar
from tests.support.registry import Registry
from tests.support.registry_front import Front, run_front

FILES = 60
SHARE = 0.12  # of the bytes of an update, that change 5 % of the image's


@pytest.fixture
async def front(registry: Registry) -> AsyncIterator[Front]:
    async with run_front(registry.host) as front:
        yield front


@pytest.fixture(autouse=True)
def any_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine the measured latency would decide."""
    monkeypatch.setattr(partial, "UNPACK_SECONDS", 1000.0)


def layer(seed: int, *, changed: int = 0, mtime: int = 1_700_000_000) -> bytes:
    """Files of 24 KiB on average, with folders, links, a whiteout, a device and empty files. ``changed`` have others.

    One file has several chunks.
    """
    members = [folder("usr/"), folder("usr/share/"), entry("usr/share/.wh.gone", b""), entry("usr/share/empty", b"")]
    for number in range(FILES):
        chance = random.Random(f"{seed} {number} {changed if number * changed // FILES % 2 else 0}")
        size = 200_000 if number == 7 else chance.randint(100, 48_000)
        members.append(entry(f"usr/share/file{number}", chance.randbytes(size)))
    members.append(entry("usr/share/link", b"", kind=b"1", link="usr/share/file3"))
    for member, _ in members:
        member.mtime = mtime
    return make_tar(members)


def updated(seed: int, *, mtime: int = 1_700_000_000) -> bytes:
    """The same layer with three other files of the same size."""
    tar = bytearray(layer(seed, mtime=mtime))
    for number in (11, 30, 52):
        place = tar.index(b"usr/share/file%d\0" % number) + 512
        tar[place : place + 64] = random.Random(number).randbytes(64)
    return bytes(tar)


async def pulled(node: Node, front: Front, image: ChunkedImage, registry: Registry, tag: str) -> tuple[Image, int]:
    """Push the image, pull it and return it with the number of bytes that its pull fetched."""
    registry.push(image, "team/app", tag)
    before = node.puller.fetched_bytes
    found = await node.puller.pull(f"{front.host}/team/app:{tag}")
    return found, node.puller.fetched_bytes - before


def files_of(node: Node, image: Image) -> dict[str, tuple[object, ...]]:
    """What is in the layers of an image."""
    found: dict[str, tuple[object, ...]] = {}
    for position, number in enumerate(image.layers):
        root = node.images.layers.path(number)
        for path in sorted(root.rglob("*")):
            status = path.lstat()
            content = digest_of(path.read_bytes()) if path.is_file() and not path.is_symlink() else ""
            described = (status.st_mode, status.st_uid, status.st_size, status.st_mtime_ns, status.st_nlink, content)
            found[f"{position}/{path.relative_to(root)}"] = described if path.is_file() else described[:2]
    return found


async def check_as_whole(
    node: Node, new_node: Callable[..., Awaitable[Node]], front: Front, image: Image, tag: str
) -> None:
    """The image is that of a whole pull, is whole in the eyes of ``image check``, and can be exported."""
    other = await new_node(partial_pulls=False)
    whole = await other.puller.pull(f"{front.host}/team/app:{tag}")
    assert image.id == whole.id
    assert files_of(node, image) == files_of(other, whole)
    assert (await node.checker.check(repair=False)).findings == ()
    archive = node.root / "out.tar"
    await node.exporter.export([f"{front.host}/team/app:{tag}"], archive)
    (imported,) = await (await new_node()).puller.import_archive(archive)
    assert imported.id == image.id


async def test_an_update_fetches_what_has_changed_and_keeps_the_blob_of_the_manifest(
    node: Node, new_node: Callable[..., Awaitable[Node]], front: Front, registry: Registry
) -> None:
    await pulled(node, front, chunked_image(layer(1)), registry, "1")
    image, fetched = await pulled(node, front, update := chunked_image(updated(1)), registry, "2")
    size = len(update.packed[0].blob)
    assert fetched <= SHARE * size
    assert node.puller.reused_bytes > (1 - SHARE) * size
    (kept,) = [one for one in node.images.layers.all() if one.number in image.layers]
    assert (kept.blob_digest, kept.blob_bytes) == (digest_of(update.packed[0].blob), size)
    await check_as_whole(node, new_node, front, image, "2")


async def test_other_times_and_another_compressor_do_not_matter(
    node: Node, new_node: Callable[..., Awaitable[Node]], front: Front, registry: Registry
) -> None:
    """The blob is another one then, with the same content; and the next update finds files in it."""
    await pulled(node, front, chunked_image(layer(2), level=1), registry, "1")
    image, fetched = await pulled(node, front, chunked_image(updated(2, mtime=1_700_000_099)), registry, "2")
    assert fetched <= SHARE * node.images.layers.used_bytes / 2
    await check_as_whole(node, new_node, front, image, "2")
    await node.store.remove(f"{front.host}/team/app:1")
    await node.images.emptied()
    image, fetched = await pulled(node, front, chunked_image(layer(2, mtime=1_700_000_999)), registry, "3")
    assert fetched <= SHARE * node.images.layers.used_bytes / 2
    await check_as_whole(node, new_node, front, image, "3")


async def test_a_layer_without_tar_split_data_is_fetched_in_parts_if_its_times_are_the_same(
    node: Node, new_node: Callable[..., Awaitable[Node]], front: Front, registry: Registry
) -> None:
    await pulled(node, front, chunked_image(layer(3), split=False), registry, "1")
    image, fetched = await pulled(node, front, update := chunked_image(updated(3), split=False), registry, "2")
    assert fetched <= SHARE * len(update.packed[0].blob)
    await check_as_whole(node, new_node, front, image, "2")


async def test_a_layer_in_estargz_is_fetched_in_parts(
    node: Node, new_node: Callable[..., Awaitable[Node]], front: Front, registry: Registry
) -> None:
    await pulled(node, front, estargz_image(layer(10)), registry, "1")
    image, fetched = await pulled(node, front, update := estargz_image(updated(10)), registry, "2")
    assert fetched <= SHARE * len(update.packed[0].blob)
    (kept,) = [one for one in node.images.layers.all() if one.number in image.layers]
    assert kept.blob_digest == digest_of(update.packed[0].blob)
    await check_as_whole(node, new_node, front, image, "2")


def _no_ranges(front: Front, _: ChunkedLayer) -> None:
    front.refuse_ranges = True


def _wrong_ranges(front: Front, _: ChunkedLayer) -> None:
    def answer(begin: str | int, content: bytes) -> web.Response:
        return web.Response(body=content[5:], status=206, headers={"Content-Range": f"bytes 5-9/{len(content)}"})

    front.range_answer = answer


def _other_toc(_: Front, packed: ChunkedLayer) -> None:
    name = next(name for name in packed.annotations if name.endswith("checksum"))
    packed.annotations[name] = digest_of(b"another")


def _impossible_toc(_: Front, packed: ChunkedLayer) -> None:
    name = next(name for name in packed.annotations if name.endswith("manifest-position"))
    packed.annotations[name] = f"5:{len(packed.blob) - 80}:1000:1"


@pytest.mark.parametrize("spoil", [_no_ranges, _wrong_ranges, _other_toc, _impossible_toc])
async def test_the_layer_is_fetched_whole_if_its_parts_cannot_be(
    node: Node, front: Front, registry: Registry, spoil: Callable[[Front, ChunkedLayer], None]
) -> None:
    await pulled(node, front, chunked_image(layer(4)), registry, "1")
    update = chunked_image(updated(4))
    spoil(front, update.packed[0])
    image, fetched = await pulled(node, front, update, registry, "2")
    assert fetched >= len(update.packed[0].blob)
    assert (await node.checker.check(repair=False)).findings == ()
    await node.store.remove(image.id)
    await node.store.remove(f"{front.host}/team/app:1")
    assert await node.leftovers() == {}


async def test_a_damaged_kept_blob_is_not_taken_into_the_layer(node: Node, front: Front, registry: Registry) -> None:
    old, _ = await pulled(node, front, first := chunked_image(layer(5)), registry, "1")
    path = node.images.layers.blob(digest_of(first.packed[0].blob))
    assert path is not None
    with path.open("r+b") as file:
        file.seek(len(first.packed[0].blob) // 2)
        file.write(bytes(64))
    update = chunked_image(updated(5))
    image, _ = await pulled(node, front, update, registry, "2")
    findings = (await node.checker.check(repair=False)).findings
    assert {finding.digest for finding in findings} == {digest_of(first.packed[0].blob)}
    assert image.id != old.id


async def test_it_can_be_switched_off(
    new_node: Callable[..., Awaitable[Node]], front: Front, registry: Registry
) -> None:
    node = await new_node(partial_pulls=False)
    await pulled(node, front, chunked_image(layer(6)), registry, "1")
    _, fetched = await pulled(node, front, update := chunked_image(updated(6)), registry, "2")
    assert fetched >= len(update.packed[0].blob)
    assert node.puller.reused_bytes == 0


async def test_a_cancelled_partial_pull_leaves_nothing(node: Node, front: Front, registry: Registry) -> None:
    await pulled(node, front, chunked_image(layer(7)), registry, "1")
    update = chunked_image(updated(7))
    registry.push(update, "team/app", "2")
    before = await node.leftovers()
    digest = digest_of(update.packed[0].blob)
    front.hold[digest] = asyncio.Event()
    pull = asyncio.create_task(node.puller.pull(f"{front.host}/team/app:2"))
    while front.count()[f"/v2/team/app/blobs/{digest}"] < 1:  # noqa: ASYNC110 - it counts
        await asyncio.sleep(0.01)
    pull.cancel()
    await asyncio.wait((pull,))
    assert await node.leftovers() == before
    front.hold.clear()
    assert not any((node.data / "content/incoming").iterdir())
    image = await node.puller.pull(f"{front.host}/team/app:2")
    assert node.puller.reused_bytes > 0
    assert image.layers
