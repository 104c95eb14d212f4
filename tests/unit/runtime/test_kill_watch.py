"""Why a container ended on cgroup v2, from files as the kernel writes them (admin-guide/cgroup-v2, "memory.events").

With systemd, the container's cgroup and its counters are gone with its last process.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from host import processes
from runtime.cgroups.tree import CgroupTree
from runtime.containers.endings.kill_watch import KillWatch
from runtime.containers.endings.out_of_memory import KILLED_EXIT_CODE, ended_by_the_kernel, kills_for_memory
from runtime.layout import ContainerFolder
from runtime.oci.conmon import ExitRecord
from runtime.state.container import Container, ContainerState
from runtime.state.state import State
from tests.support.waiting import until

POD = "/kubepods.slice/kubepods-pod1.slice"
SCOPE = f"{POD}/podkeel-main.scope"
# Linux 6.18; older kernels have no sock_throttled, and before 5.17 no oom_group_kill.
EVENTS = "low 0\nhigh 0\nmax 214\noom {kills}\noom_kill {kills}\noom_group_kill 0\nsock_throttled 0\n"


class Node:
    """One container, whose first process is one of the test's; its cgroups are plain folders."""

    def __init__(self, root: Path, init: int) -> None:
        self.tree = root / "cgroup"
        folder = ContainerFolder(root / "bundle")
        folder.path.mkdir()
        (self.tree / SCOPE.lstrip("/")).mkdir(parents=True)
        (self.tree / SCOPE.lstrip("/") / "cgroup.procs").write_text(f"{init}\n")
        self.count(0)
        sandbox = SimpleNamespace(record=SimpleNamespace(cgroup_parent=POD, torn_down=False, oom_kills=0))
        record = SimpleNamespace(
            cgroup=SCOPE,
            state=ContainerState.RUNNING,
            init=SimpleNamespace(pid=init, started=processes.start_time(init)),
        )
        found = SimpleNamespace(id="main", title="main", sandbox=sandbox, record=record, folder=folder, killed=False)
        self.container = cast(Container, found)
        self.state = cast(State, SimpleNamespace(sandboxes=[sandbox], containers_of=lambda _: [found]))
        self.cgroups = CgroupTree(2, "systemd", {"unified": self.tree})
        self.watch = KillWatch(self.cgroups)

    def count(self, kills: int) -> None:
        """Have the kernel count so many kills in the container, and so in its pod."""
        for path in (POD, SCOPE):
            (self.tree / path.lstrip("/") / "memory.events").write_text(EVENTS.format(kills=kills))

    async def has_survived(self, kills: int) -> None:
        """Wait until it is recorded that the first process has survived so many."""
        file = self.container.folder.survived_kills
        await until(lambda: file.exists() and f'"kills":{kills},' in file.read_text())

    def reason(self, code: int = KILLED_EXIT_CODE, *, scope_is_gone: bool = True) -> bool:
        """Whether its reason is OOMKilled when it ends now."""
        if scope_is_gone:
            shutil.rmtree(self.tree / SCOPE.lstrip("/"))
        kills = kills_for_memory(self.cgroups, self.state, self.container)
        history = self.watch.history(self.container, kills)
        return ended_by_the_kernel(self.container, ExitRecord(code, time.time_ns()), history, kills)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    init = await asyncio.create_subprocess_exec("sleep", "1000")
    made = Node(tmp_path, init.pid)
    made.watch.watch(made.container)
    try:
        yield made
    finally:
        made.watch.close()
        init.kill()
        await init.wait()


@pytest.mark.parametrize("scope_is_gone", [False, True])
async def test_the_first_process_was_killed(node: Node, scope_is_gone: bool) -> None:
    """At once: neither the agent nor conmon had time to read the scope's own counters."""
    node.count(1)
    assert node.reason(scope_is_gone=scope_is_gone)


async def test_conmon_has_seen_it(node: Node) -> None:
    node.count(1)
    node.container.folder.out_of_memory.touch()
    assert node.reason()


@pytest.mark.parametrize("scope_is_gone", [False, True])
@pytest.mark.parametrize("code", [0, 1, 143])
async def test_the_program_ended_by_itself(node: Node, code: int, scope_is_gone: bool) -> None:
    node.count(1)
    assert not node.reason(code, scope_is_gone=scope_is_gone)


@pytest.mark.parametrize("scope_is_gone", [False, True])
async def test_a_kill_from_outside(node: Node, scope_is_gone: bool) -> None:
    assert not node.reason(scope_is_gone=scope_is_gone)


@pytest.mark.parametrize("scope_is_gone", [False, True])
async def test_a_kill_from_outside_long_after_a_child_was_lost(
    node: Node, monkeypatch: pytest.MonkeyPatch, scope_is_gone: bool
) -> None:
    node.count(1)
    await node.has_survived(1)
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 3600 * 1_000_000_000)
    assert not node.reason(scope_is_gone=scope_is_gone)


@pytest.mark.parametrize("scope_is_gone", [False, True])
async def test_the_first_process_was_killed_after_a_child(node: Node, scope_is_gone: bool) -> None:
    node.count(1)
    await node.has_survived(1)
    node.count(2)
    assert node.reason(scope_is_gone=scope_is_gone)


async def test_a_write_of_the_kernel_that_counts_no_kill_is_none(node: Node) -> None:
    (node.tree / SCOPE.lstrip("/") / "memory.events").write_text(EVENTS.format(kills=0).replace("214", "215"))
    await asyncio.sleep(0)
    assert not node.reason(scope_is_gone=False)
