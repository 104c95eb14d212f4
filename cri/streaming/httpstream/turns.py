"""The time that one connection may take of the event loop before others get their turn."""

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
    """Delays work on a peer's bytes: a quarter MiB of the smallest frames would take seconds.

    The link reads nothing until the rest was handled. ``waits`` says whether a rest is put off.
    """

    def __init__(self, link: Holdable) -> None:
        self._link = link
        self._closed = False
        self.waits = False

    def end_of_turn(self) -> float:
        """The time, of the monotonic clock, until which work that begins now may continue."""
        return time.monotonic() + SECONDS

    def put_off(self, end: float, rest: Callable[[], None]) -> bool:
        """Have ``rest`` called in another turn of the loop if ``end`` has passed; returns whether it has."""
        if time.monotonic() < end:
            return False
        self.waits = True
        self._link.hold(self)
        asyncio.get_running_loop().call_soon(self._go_on, rest)
        return True

    def close(self) -> None:
        """Drop the rest."""
        self._closed = True

    def _go_on(self, rest: Callable[[], None]) -> None:
        self.waits = False
        if not self._closed:
            rest()
        if not self.waits:
            self._link.release(self)
