"""Whose processes the kernel killed for memory, where the cgroups of ended containers are gone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from runtime.cgroups.tree import CgroupTree
from runtime.containers.endings.out_of_memory import kills_for_memory
from runtime.state.container import Container, ContainerState
from runtime.state.state import State


class Pod:
    """A pod of two containers, its cgroups plain folders."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sandbox = SimpleNamespace(record=SimpleNamespace(cgroup_parent="/pod", torn_down=False, oom_kills=0))
        self.containers = [self._container("first"), self._container("second")]
        self.sandboxes = [self.sandbox]
        self.count("/pod", 0)
        self.cgroups = CgroupTree(2, "cgroupfs", {"unified": root})
        state = SimpleNamespace(sandboxes=self.sandboxes, containers_of=lambda sandbox: self.containers)
        self.state = cast(State, state)

    def _container(self, name: str) -> Container:
        self.count(f"/pod/{name}", 0)
        record = SimpleNamespace(cgroup=f"/pod/{name}", state=ContainerState.RUNNING)
        return cast(Container, SimpleNamespace(sandbox=self.sandbox, record=record))

    def count(self, path: str, kills: int) -> None:
        folder = self.root / path.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.events").write_text(f"low 0\noom {kills}\noom_kill {kills}\noom_group_kill 0\n")

    def end(self, number: int) -> int:
        container = self.containers[number]
        (self.root / container.record.cgroup.lstrip("/") / "memory.events").unlink()
        told = kills_for_memory(self.cgroups, self.state, container)
        container.record.state = ContainerState.EXITED
        return told


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    return Pod(tmp_path)


def test_kills_that_no_living_container_had_are_those_of_the_one_that_ended(pod: Pod) -> None:
    pod.count("/pod", 3)
    pod.count("/pod/second", 1)
    assert pod.end(0) == 2
    assert pod.sandbox.record.oom_kills == 2
    assert pod.end(1) == 1
    assert pod.sandbox.record.oom_kills == 3


def test_kills_in_other_containers_are_not_counted_twice(pod: Pod) -> None:
    pod.count("/pod", 1)
    assert pod.end(0) == 1
    assert pod.end(1) == 0


def test_kills_from_before_the_pod_are_not_attributed(pod: Pod) -> None:
    pod.count("/pod", 5)
    pod.sandbox.record.oom_kills = 5
    assert pod.end(0) == 0


def test_pods_that_share_a_cgroup_have_only_what_their_own_cgroups_say(pod: Pod) -> None:
    other = SimpleNamespace(record=SimpleNamespace(cgroup_parent="/pod", torn_down=False, oom_kills=0))
    pod.sandboxes.append(other)
    pod.count("/pod", 2)
    pod.count("/pod/second", 1)
    assert pod.end(0) == 0
    assert kills_for_memory(pod.cgroups, pod.state, pod.containers[1]) == 1
    other.record.torn_down = True
    assert pod.end(1) == 2
