"""The scheduling of a process's CPU time and I/O: system calls that Python does not offer."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from host import libc

POLICIES = {
    "SCHED_OTHER": 0,
    "SCHED_FIFO": 1,
    "SCHED_RR": 2,
    "SCHED_BATCH": 3,
    "SCHED_IDLE": 5,
    "SCHED_DEADLINE": 6,
}
FLAGS = {
    "SCHED_FLAG_RESET_ON_FORK": 0x01,
    "SCHED_FLAG_RECLAIM": 0x02,
    "SCHED_FLAG_DL_OVERRUN": 0x04,
    "SCHED_FLAG_KEEP_POLICY": 0x08,
    "SCHED_FLAG_KEEP_PARAMS": 0x10,
    "SCHED_FLAG_UTIL_CLAMP_MIN": 0x20,
    "SCHED_FLAG_UTIL_CLAMP_MAX": 0x40,
}
IO_CLASSES = {"IOPRIO_CLASS_RT": 1, "IOPRIO_CLASS_BE": 2, "IOPRIO_CLASS_IDLE": 3}

_PROCESS = 1  # IOPRIO_WHO_PROCESS
_CLASS_SHIFT = 13
# sched_setattr, ioprio_set and ioprio_get: some architectures have their own numbers, all others share a table.
_SET_SCHEDULER, _SET_IO, _GET_IO = {
    "x86_64": (314, 251, 252),
    "s390x": (345, 282, 283),
    "ppc64le": (355, 273, 274),
}.get(os.uname().machine, (274, 30, 31))


class _SchedulerAttributes(ctypes.Structure):
    """struct sched_attr (sched_setattr(2)), in its first version."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    )


def set_scheduler(
    pid: int,
    policy: int,
    *,
    flags: int = 0,
    nice: int = 0,
    priority: int = 0,
    runtime: int = 0,
    deadline: int = 0,
    period: int = 0,
) -> None:
    """Set the policy of the CPU scheduler for every thread of a process. Times in nanoseconds. Raises OSError."""
    size = ctypes.sizeof(_SchedulerAttributes)
    attributes = _SchedulerAttributes(size, policy, flags, nice, priority, runtime, deadline, period)
    for thread in _threads(pid):
        libc.syscall(_SET_SCHEDULER, ctypes.c_int(thread), ctypes.byref(attributes), ctypes.c_uint(0))


def set_io_priority(pid: int, io_class: int, priority: int) -> None:
    """Set the class (IOPRIO_CLASS_*) and priority of the I/O of every thread of a process. Raises OSError."""
    for thread in _threads(pid):
        value = ctypes.c_int(io_class << _CLASS_SHIFT | priority)
        libc.syscall(_SET_IO, ctypes.c_int(_PROCESS), ctypes.c_int(thread), value)


def io_priority(pid: int) -> tuple[int, int]:
    """The class (IOPRIO_CLASS_*) and priority of a process's I/O. Raises OSError."""
    value = libc.syscall(_GET_IO, ctypes.c_int(_PROCESS), ctypes.c_int(pid))
    return value >> _CLASS_SHIFT, value & ((1 << _CLASS_SHIFT) - 1)


def _threads(pid: int) -> list[int]:
    return sorted(int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir())
