"""Gives this process priority over its children, so that it answers calls while containers are being made."""

from __future__ import annotations

import contextlib
import os

_NICENESS = -10
_LEAST_NICE = -20


def go_first() -> None:
    """Give the calling thread priority. Threads and processes that it starts have the usual one.

    Where sessions are scheduled as groups (sched(7), "autogroup feature") this one's is preferred. Call it before other
    threads are there. Without the right to (CAP_SYS_NICE) nothing happens.
    """
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, 0, _NICENESS)
        with contextlib.suppress(OSError), open("/proc/self/autogroup", "wb", 0) as group:
            group.write(b"%d" % _NICENESS)


def run_before_children(pid: int) -> None:
    """Prefer a process to those that it starts from now on, which keep the usual priority.

    Without CAP_SYS_NICE nothing happens. No real-time policy is used: a client or an image decides how much the process
    reads, and the rest of the node must get its share meanwhile.
    """
    with contextlib.suppress(PermissionError, ProcessLookupError):
        os.sched_setscheduler(pid, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, pid, _LEAST_NICE)
