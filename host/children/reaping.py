"""Reaping children: the exit of a child is known at once, and a thread releases what the kernel keeps of it.

Before waitid(2) returns, the kernel takes the process's entries out of its cache of /proc. This took up to 60 ms for a
program with threads while others ended too, and a program in a container can prolong it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import threading


def reap(pidfd: int) -> int | None:
    """How an ended child ended: its exit status, or minus the signal that killed it; it is collected in the background.

    None if it still runs, or is not our child. The descriptor stays the caller's.
    """
    try:
        ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    if ended is None:
        return None
    try:
        own = os.dup(pidfd)
    except OSError:  # no descriptor is left
        _collect(pidfd)
    else:
        _collected_by_thread().put(own)
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


@functools.cache
def _collected_by_thread() -> queue.SimpleQueue[int]:
    """The queue of pidfds of ended children. A thread, started at the first use, reaps the children and closes the
    pidfds."""
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()

    def collect_all() -> None:
        while True:
            pidfd = ended.get()
            _collect(pidfd)
            os.close(pidfd)

    threading.Thread(target=collect_all, name="reaper", daemon=True).start()
    return ended


def _collect(pidfd: int) -> None:
    with contextlib.suppress(ChildProcessError):  # already collected
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
