"""Killing what is left in the cgroups of containers."""

from __future__ import annotations

import contextlib
import os
import signal

from host import processes
from runtime.cgroups.tree import CgroupTree
from runtime.state.container import ContainerRecord

_CGROUP_SECONDS = 5.0


def kill_group(cgroups: CgroupTree, record: ContainerRecord) -> None:
    """Kill what may outlive a container's first process, and what cannot die as it is frozen."""
    if not record.private_pid_namespace or cgroups.is_frozen(record.cgroup):
        cgroups.kill(record.cgroup)


def clear_cgroup(cgroups: CgroupTree, path: str) -> None:
    """Kill what is left in a cgroup, in whichever hierarchies it is, and remove it. Blocks until that has ended."""
    cgroups.kill(path)
    pids = cgroups.all_processes(path)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    processes.wait_all_ended(pids, _CGROUP_SECONDS)
    cgroups.remove(path)
