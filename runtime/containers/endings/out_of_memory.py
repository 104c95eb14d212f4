"""Finds out whether the kernel killed a container for lack of memory, also after its cgroup is removed."""

from __future__ import annotations

import time

from runtime.cgroups.limits import out_of_memory_kills
from runtime.cgroups.tree import CgroupTree
from runtime.containers.endings.kill_watch import KillHistory
from runtime.oci.conmon import ExitRecord
from runtime.state.container import Container, ContainerState
from runtime.state.state import State

KILLED_EXIT_CODE = 137  # 128 + SIGKILL
# A program that survives a kill can pass on the code of the killed process, as shells do, if it ends within this time.
_NEAR = 800_000_000
# The time if no check showed that the first process survived: it may have needed some time to end after the kill.
_NEAR_UNSEEN = 2_000_000_000


def kills_for_memory(cgroups: CgroupTree, state: State, container: Container) -> int:
    """The number of processes of an ended container that were killed for a memory limit.

    systemd removes a scope, with its counters, when its last process ends. The counters of the pod's cgroup remain, and
    on cgroup v2 they include those of its descendants. Kills that neither the live containers nor those that ended
    before explain belong to this container. The pod's record keeps the explained kills; the caller saves it.
    """
    sandbox = container.sandbox
    if cgroups.version == 1 or _shares_its_parent(state, container):
        return out_of_memory_kills(cgroups, container.record.cgroup)
    alive = (
        other.record.cgroup
        for other in state.containers_of(sandbox)
        if other is not container and other.record.state in (ContainerState.CREATED, ContainerState.RUNNING)
    )
    parent = cgroups.parent_path(sandbox.record.cgroup_parent)
    ended = out_of_memory_kills(cgroups, parent) - sum(out_of_memory_kills(cgroups, path) for path in alive)
    kills = max(0, ended - sandbox.record.oom_kills)
    sandbox.record.oom_kills += kills
    return kills


def ended_by_the_kernel(container: Container, exit_record: ExitRecord | None, history: KillHistory, kills: int) -> bool:
    """Whether a kill for memory ended a container with so many ``kills``.

    It did if the first process was killed, or if it ended with the same code when its child was killed, as shells do.
    It did not if the program ended in another way or later, or if another process killed it. For an end that was not
    recorded, it may have been the reason.
    """
    if not kills and not history.more:
        return False
    if container.killed or (exit_record is not None and exit_record.code != KILLED_EXIT_CODE):
        return False
    if history.more:
        near = _NEAR_UNSEEN
        if history.at is None or exit_record is None:
            return True
    else:
        near = _NEAR
        if history.ended_by or history.at is None:
            return False
    finished = exit_record.finished_at if exit_record is not None else time.time_ns()
    return finished - history.at <= near


def _shares_its_parent(state: State, container: Container) -> bool:
    parent = container.sandbox.record.cgroup_parent
    others = (other.record for other in state.sandboxes if other is not container.sandbox)
    return any(record.cgroup_parent == parent and not record.torn_down for record in others)
