"""A pull does not fetch the bytes of an interrupted pull again, and checks them before use."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web

from host.errors import InvalidArgumentError, KubeletReasonError, LimitError, PermissionDeniedError
from host.processes import end_child, open_process, spawn
from tests.integration.images.conftest import Node
from tests.integration.images.test_restart import PROGRAM
from tests.support.image_builder import BuiltImage, digest_of, entry, make_tar
from tests.support.registry import Registry
from tests.support.registry_front import Front, run_front
from tests.support.waiting import until

NewNode = Callable[..., Awaitable[Node]]


@pytest.fixture(scope="module")
def built() -> BuiltImage:
    return BuiltImage(tuple(make_tar([entry(name, os.urandom(3_000_000))]) for name in "ab"))


@pytest.fixture
async def front(registry: Registry, built: BuiltImage) -> AsyncIterator[Front]:
    registry.push(built, "resumed")
    async with run_front(registry.host) as running:
        yield running


def name(front: Front) -> str:
    return f"{front.host}/resumed:latest"


def partials(node: Node) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (node.data / "content/partial").iterdir()}


def has_whole_blob(node: Node) -> bool:
    """Whether one of the two layers exists as a whole blob, under any name."""
    for path in (node.data / "content").glob("*/*"):
        with contextlib.suppress(FileNotFoundError):  # it was renamed just now
            if path.stat().st_size > 3_000_000:
                return True
    return False


def ranges(front: Front) -> list[str]:
    """The ranges of the requests for large blobs."""
    return [
        headers.get("Range", "all")
        for _, path, headers in front.seen
        if "/blobs/" in path and f"{digest_of(b'')}" not in path and "config" not in path
    ]


async def interrupted(node: Node, front: Front, size: int) -> None:
    """A pull that receives ``size`` bytes of each layer before the registry fails."""
    front.cut_after = size
    front.refuse_ranges = True
    with pytest.raises(KubeletReasonError, match="interrupted"):
        await node.puller.pull(name(front))
    front.cut_after = 0
    front.refuse_ranges = False
    front.seen.clear()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    async def at_once(failures: int, retry_after: str = "") -> None:
        await asyncio.sleep(0)

    monkeypatch.setattr("images.registry.client.back_off", at_once)


async def test_the_next_pull_resumes_an_interrupted_one(node: Node, front: Front, built: BuiltImage) -> None:
    await interrupted(node, front, 1_500_000)
    left = partials(node)
    assert sorted(left.values())[-1] == 1_500_000
    assert node.store.filesystem_usage().used_bytes >= sum(left.values())
    assert (await node.puller.pull(name(front))).id == built.id
    assert "bytes=1500000-" in ranges(front)
    # Bytes that arrived after the other layer failed may be lost. Without resuming it would be 3 MB more.
    assert node.puller.fetched_bytes < sum(map(len, built.layers)) + 1_000_000
    assert partials(node) == {}
    assert (await node.checker.check(repair=False)).findings == ()
    await node.store.remove(built.id)
    assert await node.leftovers() == {}
    assert node.store.filesystem_usage().used_bytes == 0


async def test_a_pull_is_resumed_without_support_for_ranges(node: Node, front: Front, built: BuiltImage) -> None:
    await interrupted(node, front, 1_500_000)
    front.refuse_ranges = True
    assert (await node.puller.pull(name(front))).id == built.id
    assert (await node.checker.check(repair=False)).findings == ()


async def test_a_cancelled_pull_is_resumed_after_a_restart(node: Node, front: Front, built: BuiltImage) -> None:
    gate = front.hold_after(1)
    pulling = asyncio.create_task(node.puller.pull(name(front)))
    await until(lambda: has_whole_blob(node))
    await until(lambda: sum(layer.received for layer in node.puller.pulls()[0].layers) > 3_050_000)
    pulling.cancel()
    await asyncio.wait((pulling,))
    gate.set()
    whole, part = sorted(partials(node).values(), reverse=True)
    assert whole > 3_000_000, "the layer that was complete keeps its blob"
    assert part >= 50_000
    assert sorted(path.name for path in (node.data / "layers").iterdir()) == ["0"]
    await node.restart()
    front.seen.clear()
    assert (await node.puller.pull(name(front))).id == built.id
    assert node.puller.fetched_bytes < 3_050_000
    assert f"bytes={part}-" in ranges(front)
    await node.restart()
    assert partials(node) == {}


async def test_a_killed_pull_is_resumed(node: Node, front: Front, built: BuiltImage) -> None:
    front.trickle = 20_000
    await node.stop()
    command = [sys.executable, "-c", PROGRAM, str(node.root), "pull", name(front), ""]
    pid = spawn(command, environment={"PATH": os.environ["PATH"], "PYTHONPATH": str(Path.cwd())})
    pidfd = open_process(pid, None)
    assert pidfd is not None
    try:
        await until(lambda: sum(partials(node).values()) > 1_000_000)
    finally:
        await end_child(pid, pidfd)
    left = partials(node)
    front.trickle = 0
    front.seen.clear()
    await node.start()
    assert partials(node) == left
    assert (await node.puller.pull(name(front))).id == built.id
    for size in filter(None, left.values()):
        assert f"bytes={size}-" in ranges(front)
    assert node.puller.fetched_bytes <= sum(map(len, built.layers)) + 100_000 - sum(left.values())


async def test_a_damaged_partial_blob_is_fetched_again(node: Node, front: Front, built: BuiltImage) -> None:
    await interrupted(node, front, 1_500_000)
    for path in (node.data / "content/partial").iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert (await node.puller.pull(name(front))).id == built.id
    assert "all" in ranges(front)
    assert (await node.checker.check(repair=False)).findings == ()
    await node.store.remove(built.id)
    assert await node.leftovers() == {}


async def test_a_partial_blob_that_is_too_long_is_fetched_again(node: Node, front: Front, built: BuiltImage) -> None:
    await interrupted(node, front, 1_500_000)
    for path in (node.data / "content/partial").iterdir():
        path.write_bytes(bytes(4_000_000))
    await node.restart()
    assert (await node.puller.pull(name(front))).id == built.id


async def test_a_blob_broken_in_the_registry_leaves_nothing(
    node: Node, front: Front, built: BuiltImage, registry: Registry
) -> None:
    await interrupted(node, front, 1_500_000)
    blobs, _ = built.blobs()
    path = registry.blob_path(next(digest for digest, blob in blobs.items() if len(blob) > 1_000_000))
    good = path.read_bytes()
    path.write_bytes(good[:2_000_000] + bytes(len(good) - 2_000_000))
    try:
        with pytest.raises(InvalidArgumentError, match="broken"):
            await node.puller.pull(name(front))
    finally:
        path.write_bytes(good)
    assert await node.leftovers() == {}


async def test_two_pulls_at_once_share_a_partial_blob(node: Node, front: Front, built: BuiltImage) -> None:
    await interrupted(node, front, 1_500_000)
    other = BuiltImage((built.layers[1], built.layers[0], built.layers[1]))
    await asyncio.gather(
        node.puller.pull(name(front)), node.puller.pull(Registry.push(_registry(front), other, "resumed", "other"))
    )
    # Bytes that arrived after the other layer failed may be lost. A blob fetched twice would be 1.5 MB more.
    assert node.puller.fetched_bytes < 7_000_000, "no blob came twice, though each is a layer several times"
    assert (await node.checker.check(repair=False)).findings == ()
    for image in node.store.images():
        await node.store.remove(image.id)
    assert await node.leftovers() == {}


def _registry(front: Front) -> Registry:
    return Registry(front.upstream, Path(), 0)


async def test_unused_partial_blobs_are_deleted(new_node: NewNode, front: Front) -> None:
    node = await new_node(partial_hours=0.4 / 3600)
    await interrupted(node, front, 1_500_000)
    await until(lambda: not partials(node))
    assert await node.leftovers() == {}
    assert node.store.filesystem_usage().used_bytes == 0


async def test_a_layer_that_waits_for_lower_layers_keeps_its_blob(node: Node, front: Front, built: BuiltImage) -> None:
    gate = front.hold_after(1)
    pulling = asyncio.create_task(node.puller.pull(name(front)))
    await until(lambda: has_whole_blob(node))
    await until(lambda: sum(layer.received for layer in node.puller.pulls()[0].layers) > 3_050_000)
    await node.images.layers.partials.drop_all()
    gate.set()
    assert (await pulling).id == built.id
    assert (await node.checker.check(repair=False)).findings == ()
    await node.store.remove(built.id)
    assert await node.leftovers() == {}


async def test_a_repair_deletes_partial_blobs(node: Node, front: Front) -> None:
    await interrupted(node, front, 1_500_000)
    assert (await node.images.disk_usage()).blobs == sum(partials(node).values())
    assert (await node.checker.check(repair=False)).findings == ()
    assert partials(node)
    assert (await node.checker.check(repair=True)).findings == ()
    assert await node.leftovers() == {}


async def test_old_partial_blobs_and_other_files_are_deleted_at_the_start(node: Node, front: Front) -> None:
    await interrupted(node, front, 1_500_000)
    folder = node.data / "content/partial"
    old = next(path for path in folder.iterdir())
    os.utime(old, (1, 1))
    (folder / "sha256-what").write_text("")
    (folder / "sub").mkdir()
    await node.restart()
    assert old.name not in partials(node)
    assert set(partials(node)) <= {path for path in partials(node) if len(path) == 71}
    assert node.store.filesystem_usage().used_bytes == sum(partials(node).values())


async def test_nothing_is_resumed_if_blobs_are_not_kept(new_node: NewNode, front: Front, built: BuiltImage) -> None:
    node = await new_node(keep_blobs=False)
    await interrupted(node, front, 1_500_000)
    assert await node.leftovers() == {}
    assert (await node.puller.pull(name(front))).id == built.id
    assert set(ranges(front)) == {"all"}


def part(status: int, content: bytes, says: str) -> web.Response:
    return web.Response(status=status, body=content, headers={"Content-Range": says} if says else {})


RANGE_ANSWERS: dict[str, Callable[[int, bytes], web.Response]] = {
    "416": lambda begin, whole: part(416, b"no", f"bytes */{len(whole)}"),
    "400": lambda begin, whole: part(400, b"no", ""),
    "403": lambda begin, whole: part(403, b"no", ""),
    "500": lambda begin, whole: part(500, b"no", ""),
    "501": lambda begin, whole: part(501, b"no", ""),
    "from an earlier byte": lambda begin, whole: part(206, whole[1000:], f"bytes 1000-{len(whole) - 1}/{len(whole)}"),
    "from a later byte": lambda begin, whole: part(
        206, whole[begin + 7 :], f"bytes {begin + 7}-{len(whole) - 1}/{len(whole)}"
    ),
    "from the first byte": lambda begin, whole: part(206, whole, f"bytes 0-{len(whole) - 1}/{len(whole)}"),
    "from an unknown source": lambda begin, whole: part(206, whole, ""),
    "in another unit": lambda begin, whole: part(206, whole, f"pages 0-{len(whole) - 1}/{len(whole)}"),
    "as a whole": lambda begin, whole: part(200, whole, ""),
}


@pytest.mark.parametrize("answer", RANGE_ANSWERS)
async def test_the_whole_blob_is_requested_if_the_rest_is_not_sent(
    node: Node, front: Front, built: BuiltImage, answer: str
) -> None:
    await interrupted(node, front, 1_500_000)
    front.range_answer = RANGE_ANSWERS[answer]
    assert (await node.puller.pull(name(front))).id == built.id
    assert "bytes=1500000-" in ranges(front)
    assert (await node.checker.check(repair=False)).findings == ()
    assert partials(node) == {}


@pytest.mark.parametrize("answer", ["416", "from a later byte"])
async def test_the_rest_is_requested_again_if_a_whole_answer_is_interrupted(
    node: Node, front: Front, built: BuiltImage, answer: str
) -> None:
    front.range_answer = RANGE_ANSWERS[answer]
    front.cut_after = 1_500_000
    front.cuts = 1
    assert (await node.puller.pull(name(front))).id == built.id
    assert "bytes=1500000-" in ranges(front)


async def test_refused_access_is_not_retried(node: Node, front: Front, built: BuiltImage) -> None:
    await interrupted(node, front, 1_500_000)
    front.failures["/blobs/"] = [403] * 20
    with pytest.raises(PermissionDeniedError, match="refused access"):
        await node.puller.pull(name(front))


async def test_an_image_over_the_limits_does_not_affect_others(
    new_node: NewNode, front: Front, registry: Registry, built: BuiltImage
) -> None:
    node = await new_node(max_layer_entries=10)
    await interrupted(node, front, 1_500_000)
    left = partials(node)
    many = BuiltImage((make_tar([entry(f"file{number}", "") for number in range(20)]),))
    with pytest.raises(LimitError, match="max_layer_entries"):
        await node.puller.pull(registry.push(many, "resumed/many"))
    assert partials(node) == left
    assert (await node.puller.pull(name(front))).id == built.id


async def test_an_image_has_a_limit_as_a_whole(
    new_node: NewNode, front: Front, registry: Registry, built: BuiltImage
) -> None:
    node = await new_node(max_image_bytes=2_000_000)
    with pytest.raises(LimitError, match=r"compressed layers have 60.*max_image_bytes"):
        await node.puller.pull(name(front))
    large = [digest for digest, blob in built.blobs()[0].items() if len(blob) > 1_000_000]
    assert not any(digest in path for digest in large for _, path, _ in front.seen)
    zeros = BuiltImage(tuple(make_tar([entry(f"zeros{number}", bytes(900_000))]) for number in range(4)))
    with pytest.raises(LimitError, match=r"layers take .* and more.*max_image_bytes"):
        await node.puller.pull(registry.push(zeros, "resumed/zeros"))
    await node.forget_partials()
    assert await node.leftovers() == {}
    two = BuiltImage(zeros.layers[:2])
    assert (await node.puller.pull(registry.push(two, "resumed/two"))).id == two.id
