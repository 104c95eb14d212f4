"""Reads other processes and the kernel's tables in /proc (proc(5)), with limits and as bytes.

A process can choose its name and its command line, which may have many megabytes. It can also choose the bytes of paths
and interfaces in the kernel's tables.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_COMMAND_LINE_BYTES = 64 * 1024
_STATUS_BYTES = 8 * 1024
_STAT_FLAGS = 6  # the index of the flags among the fields behind the name in /proc/PID/stat
_PF_EXITING = 0x4
_PF_SIGNALED = 0x400
_SIGKILL_BIT = 1 << 8


def all_pids() -> Iterator[int]:
    """The processes that /proc shows."""
    with os.scandir("/proc") as entries:
        for entry in entries:
            if entry.name.isdigit():
                yield int(entry.name)


def read_bounded(path: str, limit: int) -> bytes:
    """The first ``limit`` bytes of a file in /proc. Empty if the file or its process is gone or may not be read."""
    parts: list[bytes] = []
    with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
        while limit > 0 and (part := file.read(limit)):
            parts.append(part)
            limit -= len(part)
    return b"".join(parts)


def command_line(pid: int, limit: int = _COMMAND_LINE_BYTES) -> list[bytes]:
    """The words of a process's command line within its first ``limit`` bytes. The process can choose any content."""
    return read_bounded(f"/proc/{pid}/cmdline", limit).split(b"\0")


def user_of(pid: int) -> int | None:
    """The real user id of a process; None if it is gone."""
    for line in read_bounded(f"/proc/{pid}/status", _STATUS_BYTES).split(b"\n"):
        if line.startswith(b"Uid:"):
            return int(line.split()[1])
    return None


def parent_of(pid: int) -> int | None:
    """The pid of a process's parent; None if it is gone."""
    fields = read_bounded(f"/proc/{pid}/stat", _STATUS_BYTES).rpartition(b")")[2].split()
    return int(fields[1]) if len(fields) > 1 else None


def is_being_killed(pid: int) -> bool:
    """Whether a process has received SIGKILL, or is exiting for another reason, but has not ended yet."""
    fields = read_bounded(f"/proc/{pid}/stat", _STATUS_BYTES).rpartition(b")")[2].split()
    if len(fields) <= _STAT_FLAGS or fields[0] in (b"Z", b"X"):
        return False
    if int(fields[_STAT_FLAGS]) & (_PF_EXITING | _PF_SIGNALED):
        return True
    status = read_bounded(f"/proc/{pid}/status", _STATUS_BYTES).split(b"\n")
    pending = (line.split()[1] for line in status if line.startswith((b"SigPnd:", b"ShdPnd:")))
    return any(int(mask, 16) & _SIGKILL_BIT for mask in pending)


def has_in_environment(pid: int, entry: bytes) -> bool:
    """Whether ``entry`` (``NAME=value``) is in the first part of the environment that a process was started with."""
    return entry in read_bounded(f"/proc/{pid}/environ", _COMMAND_LINE_BYTES).split(b"\0")


def runs_program(pid: int, program: str) -> bool:
    """Whether process ``pid`` of user 0 runs the file ``program``, an absolute path, also if it was replaced since.

    A replaced program is recognized by its name only, so the process must see the same files as the agent.
    """
    process, wanted = Path(f"/proc/{pid}"), Path(os.path.realpath(program))
    try:
        # Checked first, because it costs least and excludes most processes.
        if Path(str((process / "exe").readlink()).removesuffix(" (deleted)")).name != wanted.name:
            return False
        if user_of(pid) != 0:
            return False
        if (process / "ns/mnt").samefile("/proc/self/ns/mnt"):
            return True
        return (process / "exe").samefile(wanted)
    except OSError:
        return False


def table_lines(path: str) -> list[bytes]:
    """The lines of a kernel table. Names in it may have any bytes. Raises OSError."""
    with open(path, "rb") as table:
        return table.read().removesuffix(b"\n").split(b"\n")
