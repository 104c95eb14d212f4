"""Reaps children. The exit of a child is known at once; a thread then frees what the kernel keeps of it.

Before waitid(2) returns, the kernel removes the process's entries from its cache of /proc. This took up to 60 ms for a
program with threads while other processes ended too, and a program in a container can prolong it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import threading


def reap(pidfd: int) -> int | None:
    """The exit status of an ended child, or minus the signal that killed it. It is reaped in the background.

    None if it still runs, or is not a child of this process. The caller keeps the descriptor.
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
    """The queue of pidfds of ended children. A thread, started at the first use, reaps them and closes the pidfds."""
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()

    def collect_all() -> None:
        while True:
            pidfd = ended.get()
            _collect(pidfd)
            os.close(pidfd)

    threading.Thread(target=collect_all, name="reaper", daemon=True).start()
    return ended


def _collect(pidfd: int) -> None:
    with contextlib.suppress(ChildProcessError):  # already reaped
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
