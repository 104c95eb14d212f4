"""The progress of running pulls, and when a pull is aborted."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from host.errors import KubeletReasonError
from host.files.procfs import all_pids, command_line, parent_of
from images.content.progress import LayerState, PullProgress
from tests.integration.images.conftest import Node
from tests.support.agent import SOON
from tests.support.image_builder import BuiltImage, entry, make_tar
from tests.support.registry import Registry
from tests.support.registry_front import Front, run_front

NewNode = Callable[..., Awaitable[Node]]


@pytest.fixture(scope="module")
def built() -> BuiltImage:
    return BuiltImage(tuple(make_tar([entry(name, os.urandom(300_000))]) for name in "abc"))


@pytest.fixture
async def front(registry: Registry, built: BuiltImage) -> AsyncIterator[Front]:
    registry.push(built, "progress")
    async with run_front(registry.host) as running:
        yield running


async def seen(node: Node, good: Callable[[PullProgress], bool]) -> PullProgress:
    """The only running pull, once ``good`` is true for it."""
    async with asyncio.timeout(SOON):
        while True:
            pulls = node.puller.pulls()
            if len(pulls) == 1 and good(pulls[0]):
                return pulls[0]
            await asyncio.sleep(0.005)


def workers() -> list[int]:
    """Unpack workers that are children of this process."""
    ours = (pid for pid in all_pids() if parent_of(pid) == os.getpid())
    return [pid for pid in ours if b"unpack.worker" in b" ".join(command_line(pid))]


async def test_layers_and_bytes_are_visible_while_a_pull_runs(
    new_node: NewNode, front: Front, built: BuiltImage
) -> None:
    node = await new_node(max_parallel_downloads=1)
    name = f"{front.host}/progress"
    gate = front.hold_after(2)
    pulling = asyncio.create_task(node.puller.pull(name))
    progress = await seen(
        node, lambda pull: any(layer.received > 0 for layer in pull.layers if layer.received < layer.size)
    )
    assert progress.reference == f"{name}:latest"
    (held,) = (layer for layer in progress.layers if 0 < layer.received < layer.size)
    assert held.state is LayerState.RUNNING
    for layer in progress.layers:
        assert layer.size > 300_000
        if layer is not held:  # a layer that waits for those below it is fetched, but not done
            assert layer.received == (0 if layer.state is LayerState.WAITING else layer.size)
    gate.set()
    assert (await pulling).id == built.id
    assert node.puller.pulls() == []


async def test_a_pull_from_a_slow_registry_fails_and_names_it(new_node: NewNode, front: Front) -> None:
    node = await new_node(slowest_bytes_per_second=1_000_000, slow_seconds=0.4)
    front.trickle = 2_000
    with pytest.raises(
        KubeletReasonError, match=rf"{front.host} is too slow: \d+ bytes were received in \d+\.\d+ s"
    ) as caught:
        await node.puller.pull(f"{front.host}/progress")
    assert caught.value.message.startswith("RegistryUnavailable: ")
    await node.forget_partials()
    assert await node.leftovers() == {}


async def test_a_pull_from_a_registry_above_the_minimum_rate_succeeds(
    new_node: NewNode, front: Front, built: BuiltImage
) -> None:
    node = await new_node(slowest_bytes_per_second=1_000, slow_seconds=0.5)
    front.trickle = 30_000
    assert (await node.puller.pull(f"{front.host}/progress")).id == built.id
    await node.store.remove(built.id)
    node = await new_node(slowest_bytes_per_second=0, slow_seconds=0.0)
    assert (await node.puller.pull(f"{front.host}/progress")).id == built.id


async def test_a_cancelled_pull_ends_its_workers(node: Node, front: Front) -> None:
    gate = front.hold_after(0)
    pulling = asyncio.create_task(node.puller.pull(f"{front.host}/progress"))
    await seen(node, lambda pull: sum(layer.received > 0 for layer in pull.layers) == 3)
    async with asyncio.timeout(SOON):
        while len(workers()) < 3:  # noqa: ASYNC110  # a process shows its program once it has executed it
            await asyncio.sleep(0.005)
    pulling.cancel()
    async with asyncio.timeout(SOON):  # held answers are never sent
        await asyncio.wait((pulling,))
    assert workers() == []
    assert node.puller.pulls() == []
    async with asyncio.timeout(SOON):
        await front.left.wait()
    assert not gate.is_set()
    assert len(await node.forget_partials()) == 3
    assert await node.leftovers() == {}
