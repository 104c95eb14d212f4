"""A registry or an image that delays its own pull does not delay other pulls, commands, stops or lists."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from proto.runtime.v1 import cri_pb2
from tests.support.agent import PATIENCE, SOON, AgentProcess
from tests.support.image_builder import BuiltImage, digest_of, entry, folder, make_tar
from tests.support.pods import run_container
from tests.support.registry import Registry
from tests.support.registry_front import Front, run_front
from tests.support.waiting import until

_DRIP = 130  # bytes in a tenth of a second: more than the minimum rate


@pytest.fixture
async def slow(registry: Registry) -> AsyncIterator[Front]:
    async with run_front(registry.host) as front:
        yield front


def pull(agent: AgentProcess, name: str) -> Any:
    request = cri_pb2.PullImageRequest(image=cri_pb2.ImageSpec(image=name))
    return agent.client.future("PullImage", request, timeout=120 * PATIENCE)


async def pulled(agent: AgentProcess, name: str, seconds: float = SOON) -> str:
    return str((await asyncio.to_thread(pull(agent, name).result, seconds)).image_ref)


async def remove(agent: AgentProcess, *names: str) -> None:
    for name in names:
        request = cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image=name))
        await asyncio.to_thread(agent.client.call, "RemoveImage", request)


async def slowest_answers(agent: AgentProcess, container: str, *, until_done: Callable[[], bool]) -> dict[str, float]:
    """The longest duration of a command, a list and statistics until ``until_done`` is true."""
    calls: dict[str, Callable[[], object]] = {
        "ExecSync": lambda: agent.client.output(container, "echo", "here"),
        "ListContainers": lambda: agent.client.call("ListContainers", cri_pb2.ListContainersRequest()),
        "ContainerStats": lambda: agent.client.call(
            "ContainerStats", cri_pb2.ContainerStatsRequest(container_id=container)
        ),
        "ImageFsInfo": lambda: agent.client.call("ImageFsInfo", cri_pb2.ImageFsInfoRequest()),
    }
    slowest = dict.fromkeys(calls, 0.0)
    done = False
    while not done:
        done = until_done()
        for name, call in calls.items():
            begin = time.monotonic()
            await asyncio.to_thread(call)
            slowest[name] = max(slowest[name], time.monotonic() - begin)
    return slowest


async def test_slow_layers_of_one_registry_delay_no_other_pull_or_command(
    agent: AgentProcess, registry: Registry, slow: Front
) -> None:
    dripping = BuiltImage(tuple(make_tar([entry(f"slow{number}", os.urandom(60_000))]) for number in range(8)))
    registry.push(dripping, "beside/slow")
    other = BuiltImage((make_tar([entry("other", os.urandom(60_000))]),))
    slow.drip = {blob_of(dripping, number): _DRIP for number in range(8)}
    _, container = await asyncio.to_thread(run_container, agent, "sleep", "1000")
    dripped = pull(agent, f"{slow.host}/beside/slow")
    try:
        await until(lambda: sum("/blobs/" in path for _, path, _ in slow.seen) >= 5)
        assert await pulled(agent, registry.push(other, "beside/quick")) == other.id
        # Another pull from the same registry gets a slot too.
        registry.push(other, "beside/same")
        await remove(agent, other.id)
        assert await pulled(agent, f"{slow.host}/beside/same") == other.id
        slowest = await slowest_answers(agent, container, until_done=lambda: True)
        assert max(slowest.values()) < 5 * PATIENCE, slowest
        assert not dripped.done()
    finally:
        dripped.cancel()
        slow.drip.clear()
    await asyncio.to_thread(agent.client.stop, container)
    await remove(agent, other.id)


async def test_many_pulls_of_one_registry_never_take_all_slots(
    agent: AgentProcess, registry: Registry, slow: Front
) -> None:
    images = [BuiltImage((make_tar([entry(f"held{number}", os.urandom(3000))]),)) for number in range(18)]
    gate = asyncio.Event()
    for number, image in enumerate(images):
        registry.push(image, f"beside/held{number}")
        slow.hold[blob_of(image, 0)] = gate
    other = BuiltImage((make_tar([entry("other", os.urandom(60_000))]), make_tar([entry("more", os.urandom(100))])))
    _, container = await asyncio.to_thread(run_container, agent, "sleep", "1000")
    held = [pull(agent, f"{slow.host}/beside/held{number}") for number in range(18)]
    try:
        asked = [blob_of(image, 0) for image in images]
        await until(lambda: sum(any(blob in path for blob in asked) for _, path, _ in slow.seen) >= 12)
        assert await pulled(agent, registry.push(other, "beside/one-of-another")) == other.id
        # Several pulls from the other registry have slots at the same time, because its share is the same.
        others = [BuiltImage((make_tar([entry(f"share{number}", os.urandom(3000))]),)) for number in range(6)]
        names = [registry.push(image, f"beside/share{number}") for number, image in enumerate(others)]
        assert await asyncio.gather(*(pulled(agent, name) for name in names)) == [image.id for image in others]
        await remove(agent, *names)
        slowest = await slowest_answers(agent, container, until_done=lambda: True)
        assert max(slowest.values()) < 5 * PATIENCE, slowest
        assert not any(one.done() for one in held)
    finally:
        for one in held:
            one.cancel()
        gate.set()
    await asyncio.to_thread(agent.client.stop, container)
    await remove(agent, other.id)


def blob_of(image: BuiltImage, layer: int) -> str:
    assert image.compress is not None
    return digest_of(image.compress(image.layers[layer]))


async def test_small_layers_over_a_deep_tree_delay_no_command_list_or_stop(
    agent: AgentProcess, registry: Registry
) -> None:
    deep = "/".join("d" * 250)  # each of these folders has no entry, and is looked up in the layer below
    below = make_tar([folder(deep[:end]) for end in range(1, len(deep) + 1, 2)])
    files = [entry(f"{deep}/file", "")]
    images = [BuiltImage((below, make_tar([*files, entry("number", str(number))]))) for number in range(13)]
    names = [registry.push(image, f"beside/deep{number}") for number, image in enumerate(images)]
    _, container = await asyncio.to_thread(run_container, agent, "sleep", "1000")
    pulls = [pull(agent, name) for name in names]
    slowest = await slowest_answers(agent, container, until_done=lambda: all(one.done() for one in pulls))
    assert [one.result().image_ref for one in pulls] == [image.id for image in images]
    assert max(slowest.values()) < 5 * PATIENCE, slowest
    begin = time.monotonic()
    await asyncio.to_thread(agent.client.stop, container)
    assert time.monotonic() - begin < 5 * PATIENCE
    await remove(agent, *names)
