"""Plugins whose Synchronize failed after a long time: each may connect again only after a pause."""

from __future__ import annotations

import time

from host.errors import UnavailableError

WAIT_SECONDS = 60.0
_LONG_SECONDS = 1.0  # a shorter wait does not count
_MOST = 64


class HoldUps:
    """Remembers, by the titles of plugins, until when they may not come again."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}

    def note(self, title: str, seconds: float) -> None:
        """Record how long a failed Synchronize took. No pod or container could be made meanwhile."""
        now = time.monotonic()
        self._until = {known: until for known, until in self._until.items() if until > now}
        if seconds >= _LONG_SECONDS:
            self._until[title] = now + WAIT_SECONDS

    def check(self, title: str) -> None:
        """Raise UnavailableError if a plugin may not connect yet.

        No plugin may while very many of them have to wait.
        """
        left = self._until.get(title, 0.0) - time.monotonic()
        if left > 0:
            raise UnavailableError(f"its last Synchronize kept all pods waiting: it may come again in {left:.0f} s")
        if len(self._until) >= _MOST and min(self._until.values()) > time.monotonic():
            raise UnavailableError(f"{len(self._until)} plugins kept all pods waiting by their Synchronize: come later")
