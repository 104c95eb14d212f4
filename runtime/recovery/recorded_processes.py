"""Compares the processes in a container's record with the kernel, so that no other process is used instead.

A record may be wrong: if a store was restored, edited or partly restored, its pids may belong to other processes now.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

from host import processes
from host.files import procfs
from host.processes import ProcessName
from runtime.state.container import Container, ContainerState

_TABLE_BYTES = 64 * 1024
_ALIVE = (ContainerState.CREATED, ContainerState.RUNNING)


def correct(container: Container, monitors: Callable[[], Mapping[str, int]]) -> bool:
    """Correct the processes in the record of a container of this boot. False if the record named others' processes.

    If the container may run, missing processes are searched: conmon among the running ``monitors``, the first process
    in the file that conmon wrote. Blocks.
    """
    record = container.record
    bundle = container.folder.path
    wrong = False
    if record.monitor is not None and _is_live(record.monitor) and not _watches(record.monitor.pid, bundle):
        record.monitor, wrong = None, True
    if record.init is not None and _is_live(record.init) and not _belongs(record.init.pid, container):
        record.init, wrong = None, True
    if record.state in _ALIVE and not record.start_error:
        if record.monitor is None and (pid := monitors().get(container.id)) is not None:
            record.monitor = _name(pid)
        if record.init is None:
            record.init = _first_process(bundle, container)
    return not wrong


def _is_live(name: ProcessName) -> bool:
    return processes.start_time(name.pid) == name.started


def _watches(pid: int, bundle: Path) -> bool:
    """Whether a process is the conmon of this bundle, from its command line."""
    wanted = (b"-b", str(bundle).encode())
    return procfs.user_of(pid) == 0 and wanted in pairwise(procfs.command_line(pid))


def _belongs(pid: int, container: Container) -> bool:
    """Whether a process is in the container's cgroup or below it. If it left the cgroup, conmon must be its parent."""
    lines = procfs.read_bounded(f"/proc/{pid}/cgroup", _TABLE_BYTES).split(b"\n")
    if any(container.id.encode() in line for line in lines):
        return True
    monitor = container.record.monitor
    return monitor is not None and _is_live(monitor) and procfs.parent_of(pid) == monitor.pid


def _first_process(bundle: Path, container: Container) -> ProcessName | None:
    with contextlib.suppress(OSError, ValueError):
        pid = int((bundle / "init.pid").read_bytes()[:32])
        if _belongs(pid, container):
            return _name(pid)
    return None


def _name(pid: int) -> ProcessName | None:
    started = processes.start_time(pid)
    return None if started is None else ProcessName(pid, started)
