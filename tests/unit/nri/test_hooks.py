"""Plugins get each event once. Hooks about past events delay no caller, even if they fail."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from host.stages import Operation
from manifests.nri import stub
from proto.nri.v1alpha1 import nri_pb2
from proto.runtime.v1 import cri_pb2
from runtime.cgroups.tree import CgroupTree
from runtime.hooks import Hooks
from runtime.layout import ContainerFolder, SandboxFolder
from runtime.nri.changes import Changing
from runtime.nri.hooks import NriHooks, errors_logged
from runtime.nri.options import NriOptions
from runtime.state.container import Container, ContainerRecord, ContainerState
from runtime.state.sandbox import Sandbox, SandboxRecord, SandboxState
from tests.support.agent import wait_for
from tests.unit.nri.stubs import run_in_thread


async def test_an_unexpected_error_is_logged_and_the_caller_continues(caplog: pytest.LogCaptureFixture) -> None:
    @errors_logged
    async def stopped_container() -> None:
        raise UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed")

    with caplog.at_level(logging.ERROR):
        await stopped_container()
    assert "nri: stopped_container: failed" in caplog.text


async def test_a_notification_is_sent_although_the_work_beside_it_fails() -> None:
    told = []

    async def work() -> None:
        raise OSError("the disk is full")

    async def tell() -> None:
        told.append("StopContainer")

    with pytest.raises(OSError, match="the disk is full"):
        await Hooks().concurrently(work(), tell())
    assert told == ["StopContainer"]


class Recorder(stub.Plugin):
    """Keeps the removals that it gets."""

    removed: list[str]

    def RemovePodSandbox(self, request: nri_pb2.RemovePodSandboxRequest) -> None:
        self.removed.append(request.pod.id)

    def RemoveContainer(self, request: nri_pb2.RemoveContainerRequest) -> None:
        self.removed.append(request.container.id)


@pytest.fixture
def container(tmp_path: Path) -> Container:
    record = SandboxRecord(SandboxState.NOT_READY, 1, "crun", "", "boot", cgroup_parent="/pods/web")
    pod = Sandbox("pod", cri_pb2.PodSandboxConfig(), record, SandboxFolder(tmp_path / "pod"))
    ended = ContainerRecord(ContainerState.EXITED, 1, "crun", "boot", "image", "image", "/pods/web/main")
    return Container("main", pod, cri_pb2.ContainerConfig(), ended, ContainerFolder(tmp_path / "main"))


@pytest.fixture
async def hooks(container: Container) -> AsyncIterator[NriHooks]:
    state: Any = SimpleNamespace(visible_sandboxes=lambda: [container.sandbox], visible_containers=lambda: [container])
    unused: Any = None
    made = NriHooks(
        state=state,
        handlers=unused,
        cgroups=CgroupTree(2, "cgroupfs"),
        facts=unused,
        options=NriOptions(),
        version="1",
        changing=Changing(unused, unused),
    )
    yield made
    await made.close()


@asynccontextmanager
async def connected(hooks: NriHooks, folder: Path) -> AsyncIterator[Recorder]:
    socket = folder / "nri.sock"
    server = await asyncio.get_running_loop().create_unix_server(hooks.adaptation.new_trunk, str(socket))
    plugin = Recorder("recorder", "10", str(socket))
    plugin.removed = []
    run_in_thread(plugin)
    await asyncio.to_thread(wait_for, lambda: len(hooks.adaptation.plugins) == 1)
    yield plugin
    server.close()


async def test_an_event_is_sent_before_the_commit_beside_it(hooks: NriHooks, tmp_path: Path) -> None:
    """So it is in the plugin's socket even if the agent is killed right after the commit."""
    done = []

    async def commit() -> None:
        done.append("commit")

    async def tell() -> None:
        done.append("sent")
        await asyncio.sleep(0)

    async with connected(hooks, tmp_path):
        await hooks.concurrently(commit(), tell())
    assert done == ["sent", "commit"]


async def test_a_plugin_gets_one_event_for_a_removal_tried_before_it_connected(
    hooks: NriHooks, container: Container, tmp_path: Path
) -> None:
    """Recovery tries to finish removals before plugins are served; one that fails is tried again by a client."""
    operation = Operation("RemoveContainer", container.title)

    async def remove() -> None:
        await hooks.remove_container(container, operation)
        await hooks.remove_sandbox(container.sandbox, operation)

    await remove()
    async with connected(hooks, tmp_path) as plugin:
        await remove()
        await remove()
        assert plugin.removed == ["main", "pod"]
