"""Limits the bytes that the agent holds for plugins: incomplete messages, and calls that run."""

from __future__ import annotations

from collections.abc import Callable

MOST_BYTES = 64 << 20


class Budget:
    """A limit for all plugins together.

    Where it is exceeded, a plugin is closed: of those that keep at least as much as the average, the one that has kept
    something for the longest time. One that sends its message in one go is never that.
    """

    def __init__(self, most: int = MOST_BYTES) -> None:
        self._most = most
        self._sum = 0
        self._shares: dict[Share, int] = {}  # the oldest first

    def share(self, close: Callable[[str], None]) -> Share:
        """The share of one plugin; ``close`` closes the plugin, with a reason."""
        return Share(self, close)

    @property
    def kept(self) -> int:
        """How many bytes are kept for all plugins."""
        return self._sum

    def add(self, share: Share, size: int) -> None:
        """Count more bytes for a plugin; fewer if ``size`` is negative."""
        left = self._shares.get(share, 0) + size
        self._sum += size
        if left > 0:
            self._shares[share] = left
        else:
            self._shares.pop(share, None)
        while self._sum > self._most:
            offender = next(one for one, kept in self._shares.items() if kept * len(self._shares) >= self._sum)
            kept = self._shares[offender]
            offender.close(
                f"plugins have sent more than {self._most} bytes of messages that are not complete or not answered "
                f"yet, {kept} of them are this one's"
            )


class Share:
    """What is kept for one plugin."""

    def __init__(self, budget: Budget, close: Callable[[str], None]) -> None:
        self._budget = budget
        self._close = close
        self._kept = 0
        self._closed = False

    def add(self, size: int) -> None:
        """Count bytes that have arrived. The plugin may be closed when this returns."""
        if not self._closed:
            self._kept += size
            self._budget.add(self, size)

    def drop(self, size: int) -> None:
        """Count bytes that are not kept any more."""
        if size and not self._closed:
            self._kept -= size
            self._budget.add(self, -size)

    def close(self, why: str) -> None:
        """Close the plugin, for which nothing is kept any more."""
        self.end()
        self._close(why)

    def end(self) -> None:
        """The plugin is gone, and what was kept with it."""
        if not self._closed:
            self._closed = True
            self._budget.add(self, -self._kept)
