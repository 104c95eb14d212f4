"""Pulls that share layers: no pull hangs, fails or waits because of another, or learns its credentials."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from host.errors import NotFoundError, PermissionDeniedError
from images.image import Image
from images.registry.credentials import Credentials
from tests.integration.images.conftest import Node
from tests.support.agent import SOON
from tests.support.image_builder import BuiltImage, digest_of, entry, make_tar
from tests.support.registry import Registry
from tests.support.registry_front import Front, run_front
from tests.support.waiting import until

NewNode = Callable[..., Awaitable[Node]]

SHARED = make_tar([entry("shared", os.urandom(400_000))])
ONLY_A = make_tar([entry("a", "a")])
A = BuiltImage((SHARED, ONLY_A))
B = BuiltImage((SHARED, make_tar([entry("b", "b")])))
ALICE = Credentials(username="alice", password="secret")


@pytest.fixture
async def front(registry: Registry) -> AsyncIterator[Front]:
    registry.push(A, "shared/a")
    registry.push(B, "shared/b")
    async with run_front(registry.host) as running:
        yield running


def blob_of(image: BuiltImage, layer: int) -> str:
    assert image.compress is not None
    return digest_of(image.compress(image.layers[layer]))


def pull(node: Node, front: Front, image: str, credentials: Credentials | None = None) -> asyncio.Task[Image]:
    return asyncio.create_task(node.puller.pull(f"{front.host}/shared/{image}", credentials))


async def a_fetches_and_b_waits(
    node: Node, front: Front, *credentials: Credentials, second: str = "b"
) -> tuple[asyncio.Task[Image], asyncio.Task[Image]]:
    """A pull in the middle of the shared layer, and another pull that waits for the same layer."""
    front.hold_after(0)
    first = pull(node, front, "a", *credentials[:1])
    await until(lambda: node.puller.pulls() and any(layer.received for layer in node.puller.pulls()[0].layers))
    other = pull(node, front, second, *credentials[1:])
    await until(lambda: len(node.puller.pulls()) == 2 and node.puller.pulls()[1].layers)
    await asyncio.sleep(0)
    front.hold_after(99)  # answer all later requests completely
    return first, other


async def test_b_continues_at_once_when_a_is_cancelled(node: Node, front: Front) -> None:
    first, other = await a_fetches_and_b_waits(node, front)
    await asyncio.wait((other,), timeout=0.2)
    assert not other.done()
    first.cancel()
    async with asyncio.timeout(SOON):
        assert (await other).id == B.id
    await asyncio.wait((first,))
    assert (await asyncio.wait_for(node.puller.pull(f"{front.host}/shared/a"), SOON)).id == A.id
    assert (await node.checker.check(repair=False)).findings == ()


async def test_b_continues_at_once_when_a_fails(node: Node, front: Front) -> None:
    other_blob = blob_of(A, 1)
    front.hold[other_blob] = asyncio.Event()
    front.failures[other_blob] = [404] * 9
    first, other = await a_fetches_and_b_waits(node, front)
    front.hold.pop(other_blob).set()
    async with asyncio.timeout(SOON):
        with pytest.raises(NotFoundError):
            await first
        assert (await other).id == B.id
    front.failures.clear()
    assert (await asyncio.wait_for(node.puller.pull(f"{front.host}/shared/a"), SOON)).id == A.id


async def test_one_reference_pulled_with_two_credentials(node: Node, front: Front) -> None:
    front.token_user = "alice:secret"
    same = Credentials(auth="YWxpY2U6c2VjcmV0")
    first, other = await a_fetches_and_b_waits(node, front, ALICE, same, second="a")
    first.cancel()
    async with asyncio.timeout(SOON):
        assert (await other).id == A.id
    assert sum(count for path, count in front.count().items() if path.startswith("/token")) == 2


async def test_waiters_are_cancelled_while_a_new_one_arrives(node: Node, front: Front) -> None:
    first, other = await a_fetches_and_b_waits(node, front)
    third = pull(node, front, "b", ALICE)
    await until(lambda: len(node.puller.pulls()) == 3 and node.puller.pulls()[2].layers)
    first.cancel()
    other.cancel()
    newcomer = pull(node, front, "a", ALICE)
    async with asyncio.timeout(SOON):
        assert (await third).id == B.id
        assert (await newcomer).id == A.id
        await asyncio.wait((first, other))
    for image in (A, B):
        await node.store.remove(image.id)
    assert await node.leftovers() == {}


async def test_bad_credentials_get_nothing_from_a_pull_with_good_ones(node: Node, front: Front) -> None:
    front.token_user = "alice:secret"
    held = front.hold_after(0)
    first = pull(node, front, "a", ALICE)
    await until(lambda: node.puller.pulls() and any(layer.received for layer in node.puller.pulls()[0].layers))
    for bad in (Credentials(username="mallory", password="guess"), None):
        with pytest.raises(PermissionDeniedError) as refused:
            await asyncio.wait_for(node.puller.pull(f"{front.host}/shared/a", bad), SOON)
        assert "alice" not in str(refused.value)
    held.set()
    async with asyncio.timeout(SOON):
        assert (await first).id == A.id
    # The layer that is now on the node does not help either: the registry is asked each time.
    with pytest.raises(PermissionDeniedError):
        await node.puller.pull(f"{front.host}/shared/a", Credentials(username="mallory", password="guess"))


async def test_a_credential_error_fails_only_its_own_pull(node: Node, front: Front) -> None:
    front.token_user = "*"
    shared = blob_of(A, 0)
    front.hold[shared] = asyncio.Event()
    front.failures[shared] = [403, 403]
    pulls = []
    for count, (image, user) in enumerate((("a", "alice"), ("b", "bob"), ("b", "carol")), start=1):
        pulls.append(pull(node, front, image, Credentials(username=user, password="secret")))
        await until(lambda: len(node.puller.pulls()) == count and node.puller.pulls()[-1].layers)  # noqa: B023  # at once
    await until(lambda: any(shared in path for _, path, _ in front.seen))
    front.hold.pop(shared).set()
    async with asyncio.timeout(SOON):
        with pytest.raises(PermissionDeniedError, match="user alice"):
            await pulls[0]
        with pytest.raises(PermissionDeniedError, match="user bob") as refused:
            await pulls[1]
        assert (await pulls[2]).id == B.id
    assert "alice" not in str(refused.value)
    assert "shared/a" not in str(refused.value)


async def test_no_pull_waits_for_another_registry_that_sends_the_layer_slowly(
    new_node: NewNode, front: Front, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("images.content.ingest.OTHER_REGISTRY_SECONDS", 0.5)
    node = await new_node()
    async with run_front(registry.host) as slow:
        slow.drip["/blobs/" + blob_of(A, 0)] = 130
        first = pull(node, slow, "a")
        await until(lambda: node.puller.pulls() and any(layer.received for layer in node.puller.pulls()[0].layers))
        async with asyncio.timeout(SOON):
            assert (await node.puller.pull(f"{front.host}/shared/b")).id == B.id
            assert (await node.puller.pull(f"{front.host}/shared/a")).id == A.id
        assert not first.done()
        slow.drip.clear()
        first.cancel()
        await asyncio.wait((first,))
    assert (await node.checker.check(repair=False)).findings == ()
    for image in (A, B):
        await node.store.remove(image.id)
    assert await node.forget_partials() is not None
    assert await node.leftovers() == {}


async def test_a_shared_blob_waits_for_no_slot_behind_slow_layers_of_another_pull(
    node: Node, registry: Registry
) -> None:
    slow_layers = [make_tar([entry(f"slow{number}", os.urandom(100_000))]) for number in range(4)]
    slow = BuiltImage((*slow_layers, SHARED))
    registry.push(slow, "shared/slow")
    registry.push(B, "shared/b")
    async with run_front(registry.host) as front:
        gate = asyncio.Event()
        for layer in range(4):
            front.hold[blob_of(slow, layer)] = gate
        first = pull(node, front, "slow")
        await until(lambda: sum("/blobs/" in path for _, path, _ in front.seen) >= 5)  # the shared one is next
        async with asyncio.timeout(SOON):
            assert (await node.puller.pull(f"{front.host}/shared/b")).id == B.id
        assert not first.done()
        gate.set()
        assert (await asyncio.wait_for(first, SOON)).id == slow.id


async def test_two_registries_that_send_the_same_layer_at_once_make_one(
    node: Node, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("images.content.ingest.OTHER_REGISTRY_SECONDS", 0.01)
    async with run_front(registry.host) as one, run_front(registry.host) as two:
        shared = blob_of(A, 0)
        for front in (one, two):
            front.hold[shared] = asyncio.Event()
        pulls = [pull(node, one, "a"), pull(node, two, "b")]
        await until(lambda: all(any(shared in path for _, path, _ in front.seen) for front in (one, two)))
        for front in (one, two):
            front.hold.pop(shared).set()
        async with asyncio.timeout(SOON):
            images = await asyncio.gather(*pulls)
    assert images[0].layers[0] == images[1].layers[0]
    assert (await node.checker.check(repair=False)).findings == ()
    for image in images:
        await node.store.remove(image.id)
    assert await node.leftovers() == {}


async def test_a_layer_opens_no_file_before_it_has_its_slot(node: Node, registry: Registry) -> None:
    many = BuiltImage(tuple(make_tar([entry(f"file{number}", os.urandom(2000))]) for number in range(60)))
    registry.push(many, "shared/many")
    async with run_front(registry.host) as front:
        gate = asyncio.Event()
        for layer in range(60):
            front.hold[blob_of(many, layer)] = gate
        pulling = pull(node, front, "many")
        await until(lambda: node.puller.pulls() and node.puller.pulls()[0].layers)
        await until(lambda: sum("/blobs/" in path for _, path, _ in front.seen) >= 5)
        await asyncio.sleep(0.2)  # time for everything that needs no slot
        assert len(opened_below(node.data)) <= 4 * 2, "max_parallel_downloads layers have files open"
        gate.set()
        assert (await asyncio.wait_for(pulling, SOON)).id == many.id


def opened_below(folder: Path) -> list[str]:
    found = []
    for path in Path("/proc/self/fd").iterdir():
        try:
            target = str(path.readlink())
        except FileNotFoundError:
            continue
        if target.startswith(f"{folder}/content/"):
            found.append(target)
    return found
