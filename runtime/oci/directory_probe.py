"""What an OCI runtime does with scheduling and with working directories outside of a container, found out by trying."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import msgspec

from host import processes
from host.scheduling import io_priority

_SECONDS = 30.0
_IDLE = 3  # IOPRIO_CLASS_IDLE
# By which number the descriptor of a directory is handed to an OCI runtime, also for real.
DIRECTORY_DESCRIPTOR = 6
DIRECTORY_BY_DESCRIPTOR = f"/proc/self/fd/{DIRECTORY_DESCRIPTOR}"


class Runtime(Protocol):
    """An OCI runtime as far as it is tried here."""

    def command(self, *words: str) -> list[str]:
        """A whole command line."""


class DirectoryBehaviour(msgspec.Struct, frozen=True):
    """``refuses_outside``: it starts no command whose working directory is outside of the container's root, under any
    name. ``enters_descriptors``: the name may be that of a descriptor it was handed.
    """

    refuses_outside: bool = False
    enters_descriptors: bool = False


class Scheduling(msgspec.Struct, frozen=True):
    """Whether it gives a container's first process a policy of the CPU scheduler and a priority of its I/O."""

    scheduler: bool = False
    io_priority: bool = False


TRIED_SCHEDULING: Mapping[str, Mapping[str, str | int]] = MappingProxyType(
    {"scheduler": {"policy": "SCHED_BATCH"}, "ioPriority": {"class": "IOPRIO_CLASS_IDLE", "priority": 0}}
)
"""What ``process`` of the container that is tried holds. No agent runs with it, and no right is needed for it."""


async def run_detached(runtime: Runtime, bundle: Path, container_id: str) -> int:
    """Run the container of ``bundle``, which the caller removes, and return the pid of its first process.

    Raises PodkeelError when it does not run.
    """
    pid_file = bundle / "pid"
    words = ("run", "--detach", "--bundle", str(bundle), "--pid-file", str(pid_file), container_id)
    await processes.run(runtime.command(*words), timeout=_SECONDS)
    return int(pid_file.read_text())


async def probe_behaviour(runtime: Runtime, pid: int, container_id: str) -> tuple[DirectoryBehaviour, Scheduling]:
    """Look at the first process ``pid`` of a container and run commands in it.

    Its ``/init`` waits for its end when it is its first process, and otherwise ends; its ``/host`` is the node's /proc.
    Raises PodkeelError when a command cannot be executed, OSError when the process is gone.
    """
    scheduling = Scheduling(
        scheduler=os.sched_getscheduler(pid) == os.SCHED_BATCH, io_priority=io_priority(pid) == (_IDLE, 0)
    )
    return await _probe_directories(runtime, pid, container_id), scheduling


async def _probe_directories(runtime: Runtime, pid: int, container_id: str) -> DirectoryBehaviour:
    root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        descriptors = {DIRECTORY_DESCRIPTOR: root}
        inside, outside, by_descriptor = await asyncio.gather(
            _runs_in(runtime, container_id, "/", {}),
            _runs_in(runtime, container_id, f"/host/{os.getpid()}/root", {}),
            _runs_in(runtime, container_id, DIRECTORY_BY_DESCRIPTOR, descriptors),
        )
    finally:
        os.close(root)
    return DirectoryBehaviour(refuses_outside=inside and not outside, enters_descriptors=inside and by_descriptor)


async def _runs_in(runtime: Runtime, container_id: str, directory: str, descriptors: dict[int, int]) -> bool:
    command = runtime.command("exec", "--cwd", directory, container_id, "/init", "--version")
    done = await processes.run(command, descriptors=descriptors, timeout=_SECONDS, check=False)
    return done.status == 0
