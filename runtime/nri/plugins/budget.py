"""Limits the bytes that the agent keeps for plugins: incomplete messages, and calls that run."""

from __future__ import annotations

from collections.abc import Callable

MAX_BYTES = 64 << 20


class Budget:
    """A limit for all plugins together.

    If it is exceeded, one plugin is closed. It is chosen among those that use at least the average: the one whose bytes
    have been kept for the longest time. A plugin that sends each message at once is never chosen.
    """

    def __init__(self, most: int = MAX_BYTES) -> None:
        self._most = most
        self._sum = 0
        self._shares: dict[Share, int] = {}  # the oldest first

    def share(self, close: Callable[[str], None]) -> Share:
        """The share of one plugin; ``close`` closes the plugin with a reason."""
        return Share(self, close)

    @property
    def kept(self) -> int:
        """The number of bytes that are kept for all plugins."""
        return self._sum

    def add(self, share: Share, size: int) -> None:
        """Count more bytes for a plugin, or fewer if ``size`` is negative."""
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
                f"plugins have sent more than {self._most} bytes of messages that are incomplete or not answered "
                f"yet, and this plugin {kept} of them"
            )


class Share:
    """The bytes that are kept for one plugin."""

    def __init__(self, budget: Budget, close: Callable[[str], None]) -> None:
        self._budget = budget
        self._close = close
        self._kept = 0
        self._closed = False

    def add(self, size: int) -> None:
        """Count bytes that have arrived. This may close the plugin."""
        if not self._closed:
            self._kept += size
            self._budget.add(self, size)

    def drop(self, size: int) -> None:
        """Count bytes that are no longer kept."""
        if size and not self._closed:
            self._kept -= size
            self._budget.add(self, -size)

    def close(self, why: str) -> None:
        """Close the plugin. Its bytes are no longer counted."""
        self.end()
        self._close(why)

    def end(self) -> None:
        """Stop counting: the plugin has disconnected and its bytes are freed."""
        if not self._closed:
            self._closed = True
            self._budget.add(self, -self._kept)
