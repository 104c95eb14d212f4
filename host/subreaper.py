"""The child subreaper (prctl(2), PR_SET_CHILD_SUBREAPER): adopts orphaned descendants and reaps them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

from host import libc
from host.concurrency.threads import in_thread
from host.processes import start_time

# A caller that waits for a child has reaped it long before.
_PATIENCE = 2.0


class Subreaper:
    """Makes orphaned processes children of this process. Reaps those that have been dead for ``patience`` seconds.

    So the agent notices the exit of a process that another process started for it.
    """

    def __init__(self, patience: float = _PATIENCE) -> None:
        self._patience = patience
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._sweeping: asyncio.Task[None] | None = None
        self._dead: set[int] = set()

    def adopt(self) -> None:
        """Begin, on the loop of the main thread."""
        libc.set_child_subreaper()
        self._loop.add_signal_handler(signal.SIGCHLD, self._schedule)

    async def close(self) -> None:
        """Stop reaping."""
        self._loop.remove_signal_handler(signal.SIGCHLD)
        if self._timer is not None:
            self._timer.cancel()
        if self._sweeping is not None:
            await self._sweeping

    def _schedule(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(self._patience, self._begin_sweep)

    def _begin_sweep(self) -> None:
        self._timer = None
        if _any_dead():
            self._sweeping = self._loop.create_task(self._sweep())
        else:
            self._dead = set()

    async def _sweep(self) -> None:
        dead = await in_thread(_dead_children)
        for pid in dead & self._dead:
            _reap(pid)
        self._dead = dead - self._dead
        if self._dead:
            self._schedule()


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def _any_dead() -> bool:
    try:
        return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False


def _dead_children() -> set[int]:
    pids: set[int] = set()
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            pids |= {int(pid) for pid in (thread / "children").read_text().split()}
    return {pid for pid in pids if start_time(pid) is None}
