"""Tests how an OCI runtime handles scheduling, and working directories outside of a container."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import msgspec

from host import processes
from host.scheduling import io_priority

_SECONDS = 30.0
_IDLE = 3  # IOPRIO_CLASS_IDLE
# The number under which the OCI runtime gets the descriptor of a directory, in the test and later.
DIRECTORY_DESCRIPTOR = 6
DIRECTORY_BY_DESCRIPTOR = f"/proc/self/fd/{DIRECTORY_DESCRIPTOR}"


class Runtime(Protocol):
    """The part of an OCI runtime that the test uses."""

    def command(self, *words: str) -> Callable[[], list[str]]:
        """A function that returns the complete command line."""


class DirectoryBehaviour(msgspec.Struct, frozen=True):
    """How an OCI runtime handles working directories.

    ``refuses_outside``: it starts no command whose working directory is outside of the container's root.
    ``enters_descriptors``: the working directory may be named by a descriptor that the OCI runtime got.
    """

    refuses_outside: bool = False
    enters_descriptors: bool = False


class Scheduling(msgspec.Struct, frozen=True):
    """Whether it sets the CPU scheduler's policy and the I/O priority of a container's first process."""

    scheduler: bool = False
    io_priority: bool = False


TRIED_SCHEDULING: Mapping[str, Mapping[str, str | int]] = MappingProxyType(
    {"scheduler": {"policy": "SCHED_BATCH"}, "ioPriority": {"class": "IOPRIO_CLASS_IDLE", "priority": 0}}
)
"""``process`` of the container in the test. The agent never runs with these values, and they need no right."""


async def run_detached(runtime: Runtime, bundle: Path, container_id: str) -> int:
    """Run the container of ``bundle``, which the caller removes, and return the pid of its first process.

    Raises PodkeelError if it does not run.
    """
    pid_file = bundle / "pid"
    words = ("run", "--detach", "--bundle", str(bundle), "--pid-file", str(pid_file), container_id)
    await processes.run(runtime.command(*words), timeout=_SECONDS)
    return int(pid_file.read_text())


async def probe_behaviour(runtime: Runtime, pid: int, container_id: str) -> tuple[DirectoryBehaviour, Scheduling]:
    """Check the first process ``pid`` of a container and run commands in it.

    Its ``/init`` waits for its end if it is the first process, otherwise it ends. Its ``/host`` is the node's /proc.
    Raises PodkeelError if a command cannot be executed, OSError if the process is gone.
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
