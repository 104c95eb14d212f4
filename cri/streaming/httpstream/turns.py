"""Limits how long one connection may work before the event loop runs other tasks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

SECONDS = 0.003


class Holdable(Protocol):
    """A link that can stop reading."""

    def hold(self, holder: object) -> None:
        """Read no more from the peer until ``holder`` releases."""

    def release(self, holder: object) -> None:
        """Undo ``hold``."""


class Turns:
    """Divides the work on bytes that a peer sent into turns of SECONDS each.

    A quarter MiB of the smallest frames takes seconds. When a turn has used its time, ``put_off`` schedules the rest of
    the work, and the link reads nothing until the rest is done. ``waits`` says whether work is scheduled.
    """

    def __init__(self, link: Holdable) -> None:
        self._link = link
        self._closed = False
        self.waits = False

    def end_of_turn(self) -> float:
        """When a turn that begins now must end, in seconds of the monotonic clock."""
        return time.monotonic() + SECONDS

    def put_off(self, end: float, rest: Callable[[], None]) -> bool:
        """If the time ``end`` has passed, schedule ``rest`` for a later turn. Returns whether it was scheduled."""
        if time.monotonic() < end:
            return False
        self.waits = True
        self._link.hold(self)
        asyncio.get_running_loop().call_soon(self._go_on, rest)
        return True

    def close(self) -> None:
        """Drop the work that is scheduled."""
        self._closed = True

    def _go_on(self, rest: Callable[[], None]) -> None:
        self.waits = False
        if not self._closed:
            rest()
        if not self.waits:
            self._link.release(self)
