"""The priority of a process's I/O (ioprio_get(2)), for which Python has no function."""

from __future__ import annotations

import ctypes
import os

from host import libc

_PROCESS = 1  # IOPRIO_WHO_PROCESS
_CLASS_SHIFT = 13
# Architectures with a table of system calls of their own; all others share one.
_GET = {"x86_64": 252, "s390x": 283, "ppc64le": 274}.get(os.uname().machine, 31)


def io_priority(pid: int) -> tuple[int, int]:
    """The class of a process's I/O (IOPRIO_CLASS_*) and its priority in there. Raises OSError."""
    value = libc.syscall(_GET, ctypes.c_int(_PROCESS), ctypes.c_int(pid))
    return value >> _CLASS_SHIFT, value & ((1 << _CLASS_SHIFT) - 1)
