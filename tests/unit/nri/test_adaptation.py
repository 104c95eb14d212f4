"""Several plugins at one agent: admitted one by one, called in the order of their indices."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from host.errors import InvalidArgumentError, NotFoundError, PodkeelError
from manifests.nri import stub
from proto.nri.v1alpha1 import nri_pb2
from runtime.nri.adaptation import Adaptation
from runtime.nri.answers.owners import ConflictError
from runtime.nri.answers.updates import PluginsView
from runtime.nri.messages import split
from runtime.nri.options import NriOptions
from runtime.nri.plugins import events
from tests.support.waiting import until
from tests.unit.nri.stubs import run_in_thread

SECONDS = 60.0


@dataclass
class Runtime:
    """The pods and containers of a node, and what was done to them."""

    pods: list[nri_pb2.PodSandbox] = field(default_factory=list)
    containers: list[nri_pb2.Container] = field(default_factory=list)
    updated: list[nri_pb2.ContainerUpdate] = field(default_factory=list)
    evicted: list[tuple[str, str]] = field(default_factory=list)

    async def inventory(self) -> list[nri_pb2.SynchronizeRequest]:
        return list(split(self.pods, self.containers))

    async def update(self, update: nri_pb2.ContainerUpdate, plugin: str) -> None:
        if update.container_id == "gone":
            raise NotFoundError("container 'gone' not found")
        self.updated.append(update)

    async def evict(self, eviction: nri_pb2.ContainerEviction, plugin: str) -> None:
        self.evicted.append((eviction.container_id, plugin))


class Bench:
    """An adaptation that listens, and the plugins that a test connects to it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "nri.sock"
        self.runtime = Runtime()
        node = PluginsView("podkeel", "1.0.0", self.runtime.inventory, self.runtime.update, self.runtime.evict)
        self.adaptation = Adaptation(NriOptions(request_seconds=1.0), node)

    async def connect(self, plugin_class: type[Any], name: str, index: str) -> Any:
        """A plugin that is admitted."""
        there = len(self.adaptation.plugins)
        plugin = plugin_class(name, index, str(self.path))
        run_in_thread(plugin)
        await until(lambda: len(self.adaptation.plugins) == there + 1)
        return plugin


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    server = await asyncio.get_running_loop().create_unix_server(made.adaptation.new_trunk, str(made.path))
    yield made
    await made.adaptation.close()
    server.close()
    await server.wait_closed()


class Recorder(stub.Plugin):
    """Keeps what it gets, all plugins of a test in one list."""

    seen: list[tuple[str, str]]

    def Synchronize(self, request: nri_pb2.SynchronizeRequest) -> nri_pb2.SynchronizeResponse:
        self.seen.append((self.index, f"Synchronize {len(request.pods)} {len(request.containers)} {request.more}"))
        return nri_pb2.SynchronizeResponse(more=request.more)

    def StartContainer(self, request: nri_pb2.StartContainerRequest) -> None:
        self.seen.append((self.index, f"StartContainer {request.container.id}"))


@pytest.fixture
def recorder() -> type[Recorder]:
    return type("Fresh", (Recorder,), {"seen": []})


async def start(bench: Bench, container: str = "c1") -> None:
    request = nri_pb2.StartContainerRequest(container=nri_pb2.Container(id=container))
    await bench.adaptation.call_plugins(events.START_CONTAINER, request)


async def create(bench: Bench) -> Any:
    container = nri_pb2.Container(id="new", env=["A=1"])
    made = await bench.adaptation.create(nri_pb2.CreateContainerRequest(container=container), "container new")
    await bench.adaptation.carry_out(made.updates)
    return made


async def test_plugins_are_called_in_the_order_of_their_indices(bench: Bench, recorder: type[Recorder]) -> None:
    bench.runtime.pods.append(nri_pb2.PodSandbox(id="p1"))
    for index in ("50", "10", "90"):
        await bench.connect(recorder, f"plugin{index}", index)
    await start(bench)
    assert recorder.seen[3:] == [(index, "StartContainer c1") for index in ("10", "50", "90")]
    assert recorder.seen[0] == ("50", "Synchronize 1 0 False")


async def test_what_is_too_large_for_one_message_comes_in_several(bench: Bench, recorder: type[Recorder]) -> None:
    bench.runtime.pods += [nri_pb2.PodSandbox(id=str(number)) for number in range(3)]
    bench.runtime.containers += [nri_pb2.Container(id=str(n), args=["x" * (1 << 20)]) for n in range(5)]
    await bench.connect(recorder, "sample", "10")
    assert [words for _, words in recorder.seen] == [
        "Synchronize 3 2 True",
        "Synchronize 0 2 True",
        "Synchronize 0 1 False",
    ]


def test_everything_is_in_exactly_one_message() -> None:
    pods = [nri_pb2.PodSandbox(id=str(number), name="n" * number) for number in range(50)]
    requests = list(split(pods, [], limit=200))
    assert [pod.id for request in requests for pod in request.pods] == [pod.id for pod in pods]
    assert [request.more for request in requests] == [True] * (len(requests) - 1) + [False]
    assert list(split([], [])) == [nri_pb2.SynchronizeRequest()]


async def test_a_plugin_that_cannot_take_several_messages_is_not_admitted(bench: Bench) -> None:
    class Simple(stub.Plugin):
        def Synchronize(self, request: nri_pb2.SynchronizeRequest) -> nri_pb2.SynchronizeResponse:
            return nri_pb2.SynchronizeResponse()

    bench.runtime.containers += [nri_pb2.Container(id=str(n), args=["x" * (1 << 20)]) for n in range(5)]
    thread = run_in_thread(Simple("simple", "10", str(bench.path)))
    await asyncio.to_thread(thread.join, SECONDS)
    assert not thread.is_alive()
    assert not bench.adaptation.plugins


class Adjusting(stub.Plugin):
    """Sets a variable named as the plugin, and one that the test gives."""

    shared = ""

    def CreateContainer(self, request: nri_pb2.CreateContainerRequest) -> nri_pb2.CreateContainerResponse:
        answer = nri_pb2.CreateContainerResponse()
        answer.adjust.env.add(key=self.name, value=",".join(sorted(request.container.env)))
        if self.shared:
            answer.adjust.env.add(key=self.shared, value=self.name)
        return answer


async def test_each_plugin_sees_what_those_before_it_changed(bench: Bench) -> None:
    await bench.connect(Adjusting, "second", "20")
    await bench.connect(Adjusting, "first", "10")
    made = await create(bench)
    assert [(entry.key, entry.value) for entry in made.adjustment.env] == [
        ("first", "A=1"),
        ("second", "A=1,first=A=1"),
    ]
    assert made.owners.compound[nri_pb2.Env].owners == {"first": "10-first", "second": "20-second"}


async def test_a_conflict_names_both_plugins_and_nothing_is_made(bench: Bench) -> None:
    await bench.connect(type("Shared", (Adjusting,), {"shared": "X"}), "first", "10")
    await bench.connect(type("Shared", (Adjusting,), {"shared": "X"}), "second", "20")
    with pytest.raises(ConflictError, match="container new: NRI plugins 10-first and 20-second both set Env 'X'"):
        await create(bench)


class Updating(stub.Plugin):
    """Answers with updates of other containers and an eviction."""

    wanted: tuple[tuple[str, bool], ...] = (("other", False), ("gone", True))

    def CreateContainer(self, request: nri_pb2.CreateContainerRequest) -> nri_pb2.CreateContainerResponse:
        answer = nri_pb2.CreateContainerResponse()
        for container, ignore in self.wanted:
            update = answer.update.add(container_id=container, ignore_failure=ignore)
            update.linux.resources.cpu.shares.value = 512
        answer.evict.add(container_id="old", reason="room is needed")
        return answer


async def test_updates_and_evictions_of_other_containers_are_carried_out(bench: Bench) -> None:
    await bench.connect(Updating, "sample", "10")
    await create(bench)
    assert [(update.container_id, update.linux.resources.cpu.shares.value) for update in bench.runtime.updated] == [
        ("other", 512)
    ]
    assert bench.runtime.evicted == [("old", "10-sample")]


async def test_the_container_that_is_made_cannot_be_updated(bench: Bench) -> None:
    await bench.connect(type("Wrong", (Updating,), {"wanted": (("new", False),)}), "sample", "10")
    with pytest.raises(InvalidArgumentError, match="plugin 10-sample asks to update the container that is being"):
        await create(bench)


async def test_a_plugin_updates_containers_at_any_time(bench: Bench) -> None:
    plugin = await bench.connect(Updating, "sample", "10")
    request = nri_pb2.UpdateContainersRequest()
    for container in ("a", "gone"):
        request.update.add(container_id=container).linux.resources.memory.limit.value = 1 << 20
    request.evict.add(container_id="old")
    answer = await asyncio.to_thread(plugin.update_containers, request)
    assert [update.container_id for update in answer.failed] == ["gone"]
    assert [update.container_id for update in bench.runtime.updated] == ["a"]
    assert bench.runtime.evicted == [("old", "10-sample")]


async def test_an_invalid_update_fails_alone(bench: Bench) -> None:
    plugin = await bench.connect(Updating, "sample", "10")
    request = nri_pb2.UpdateContainersRequest()
    for container in ("a", "b", "c", "b"):
        request.update.add(container_id=container).linux.resources.memory.limit.value = 1 << 20
    for wrong in (1, 2):  # a huge page limit needs a page size
        request.update[wrong].linux.resources.hugepage_limits.add(limit=1 << 20)
    request.update[2].ignore_failure = True
    answer = await asyncio.to_thread(plugin.update_containers, request)
    assert [update.container_id for update in answer.failed] == ["b"]
    assert [update.container_id for update in bench.runtime.updated] == ["a", "b"]
    assert not bench.runtime.updated[1].linux.resources.hugepage_limits


async def test_a_plugin_that_hangs_is_left_out_and_the_others_are_called(
    bench: Bench, recorder: type[Recorder]
) -> None:
    free = threading.Event()

    class Slow(stub.Plugin):
        def StartContainer(self, request: nri_pb2.StartContainerRequest) -> None:
            free.wait(SECONDS)

    await bench.connect(Slow, "slow", "10")
    await bench.connect(recorder, "sample", "20")
    try:
        await start(bench)
    finally:
        free.set()
    assert recorder.seen[-1] == ("20", "StartContainer c1")
    assert [plugin.title for plugin in bench.adaptation.plugins] == ["20-sample"]
    await start(bench, "c2")
    assert recorder.seen[-1] == ("20", "StartContainer c2")


async def test_an_error_that_a_plugin_answers_fails_the_operation(bench: Bench) -> None:
    class Refusing(stub.Plugin):
        def StartContainer(self, request: nri_pb2.StartContainerRequest) -> None:
            raise ValueError("not on this node")

    await bench.connect(Refusing, "sample", "10")
    with pytest.raises(PodkeelError, match="plugin 10-sample: StartContainer: not on this node"):
        await start(bench)
    assert len(bench.adaptation.plugins) == 1


async def test_nothing_is_created_between_a_plugins_list_and_its_first_event(
    bench: Bench, recorder: type[Recorder]
) -> None:
    async with bench.adaptation.sync_blocked():
        plugin = recorder("sample", "10", str(bench.path))
        run_in_thread(plugin)
        await until(lambda: bench.adaptation.unregistered > 0)
        await asyncio.sleep(0.05)
        assert recorder.seen == []
        bench.runtime.containers.append(nri_pb2.Container(id="c1"))
    await until(lambda: len(bench.adaptation.plugins) == 1)
    assert recorder.seen == [("10", "Synchronize 0 1 False")]
