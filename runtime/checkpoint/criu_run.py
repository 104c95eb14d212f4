"""Runs an OCI runtime that calls CRIU. If possible, CRIU is never killed while it works.

While CRIU saves a process, that process executes code of CRIU. If CRIU were killed then, the process could be left with
that code. So a cancelled checkpoint is made to fail instead: CRIU's files may not grow any more. Then CRIU restores the
processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from host import processes
from host.children.reaping import reap
from host.concurrency.tasks import uninterrupted
from host.concurrency.threads import acquired, in_thread
from host.files import procfs

GIVE_UP_SECONDS = 15.0
_LOOK_SECONDS = 0.05
_MAX_OUTPUT_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Ended:
    """How the OCI runtime ended: its exit status, or minus the signal that killed it, and its output."""

    status: int
    output: str


async def run_to_its_end(command: processes.Command, environment: Mapping[str, str], output: Path) -> Ended:
    """Run a command that calls CRIU. Its output goes to the new file ``output``: a pipe would end with the agent.

    If the caller is cancelled, CRIU is made to fail. This waits for its end, so that all processes run as before. CRIU
    is killed only if that takes longer than GIVE_UP_SECONDS.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
    descriptor = await acquired(in_thread, lambda: os.open(output, flags, 0o600), os.close)
    try:
        pid = await processes.spawn_in_thread(
            command, environment=environment, descriptors={1: descriptor, 2: descriptor}
        )
        pidfd = processes.open_child(pid)
        try:
            await processes.wait_ended(pidfd)
        except asyncio.CancelledError:
            await uninterrupted(_give_up(pid, pidfd))
            raise
        finally:
            status = reap(pidfd)
            os.close(pidfd)
        printed = os.pread(descriptor, _MAX_OUTPUT_BYTES, 0).decode(errors="replace").strip()
    finally:
        os.close(descriptor)
    return Ended(255 if status is None else status, printed)


async def _give_up(pid: int, pidfd: int) -> None:
    ending = asyncio.ensure_future(processes.wait_ended(pidfd))
    deadline = time.monotonic() + GIVE_UP_SECONDS
    while not ending.done() and time.monotonic() < deadline:
        await in_thread(_fail_group, pid)
        await asyncio.wait((ending,), timeout=_LOOK_SECONDS)
    if not ending.done():
        processes.kill_group(pid)
    await ending


def _fail_group(leader: int) -> None:
    fail_writes(group_of(leader))


def fail_writes(pids: Iterable[int]) -> None:
    """Make every further write of these processes to a file fail."""
    for pid in pids:
        with contextlib.suppress(OSError, ValueError):
            hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))


def group_of(leader: int) -> list[int]:
    """The processes of the group that ``leader`` leads or led."""
    found = []
    for pid in procfs.all_pids():
        with contextlib.suppress(OSError):
            if os.getpgid(pid) == leader:
                found.append(pid)
    return found


def working_in(folder: Path) -> list[int]:
    """The processes that work in ``folder``: OCI runtimes with the folder in their command line, and their CRIU.

    CRIU is found by its process group, or by its open files if the OCI runtime that called it has ended. Blocks.
    """
    prefix = os.fsencode(folder) + b"/"
    found: set[int] = set()
    for pid in procfs.all_pids():
        if any(word.startswith(prefix) for word in procfs.command_line(pid)):
            found |= {pid, *group_of(pid)}
        elif _is_criu(pid) and any(target.startswith(prefix) for target in _open_files(pid)):
            found.add(pid)
    return sorted(found)


def _is_criu(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_bytes().startswith(b"criu")
    except OSError:
        return False


def _open_files(pid: int) -> list[bytes]:
    found = []
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.append(bytes(link.readlink()) + b"/")
    return found
