"""Backoff for plugins whose Synchronize failed after a long time: they may connect again only after a pause."""

from __future__ import annotations

import time

from host.errors import UnavailableError

WAIT_SECONDS = 60.0
_LONG_SECONDS = 1.0  # a Synchronize that failed faster does not count
_MAX_PLUGINS = 64


class Backoff:
    """Keeps, for each title of a plugin, the time until which it may not connect."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}

    def note(self, title: str, seconds: float) -> None:
        """Record how long a failed Synchronize took. No pod or container could be created during that time."""
        now = time.monotonic()
        self._until = {known: until for known, until in self._until.items() if until > now}
        if seconds >= _LONG_SECONDS:
            self._until[title] = now + WAIT_SECONDS

    def check(self, title: str) -> None:
        """Raise UnavailableError if a plugin may not connect yet.

        If too many plugins have to wait, no plugin may connect.
        """
        left = self._until.get(title, 0.0) - time.monotonic()
        if left > 0:
            raise UnavailableError(f"its last Synchronize kept all pods waiting: it may connect again in {left:.0f} s")
        if len(self._until) >= _MAX_PLUGINS and min(self._until.values()) > time.monotonic():
            raise UnavailableError(
                f"{len(self._until)} plugins kept all pods waiting by their Synchronize: connect again later"
            )
