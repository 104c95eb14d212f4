"""Gives this process priority over its children, so that it answers calls while containers are being created."""

from __future__ import annotations

import contextlib
import os

_NICENESS = -10
_MIN_NICE = -20


def raise_priority() -> None:
    """Raise the priority of the calling thread. Threads and processes that it starts have the usual one.

    If sessions are scheduled as groups (sched(7), "autogroup feature"), the group of this session is raised too. Call
    this before other threads exist. Without CAP_SYS_NICE it does nothing.
    """
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, 0, _NICENESS)
        with contextlib.suppress(OSError), open("/proc/self/autogroup", "wb", 0) as group:
            group.write(b"%d" % _NICENESS)


def run_before_children(pid: int) -> None:
    """Raise the priority of a process. Processes that it starts later have the usual one.

    Without CAP_SYS_NICE this does nothing. It sets no real-time policy: a client or an image decides how much the
    process reads, and the rest of the node must get its share of time.
    """
    with contextlib.suppress(PermissionError, ProcessLookupError):
        os.sched_setscheduler(pid, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, pid, _MIN_NICE)
