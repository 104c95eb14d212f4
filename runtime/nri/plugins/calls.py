"""Counts the calls of plugins: number, duration and errors for each method."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

_MAX_TITLES = 256
_OTHERS = "others"


@dataclass(slots=True)
class CallCount:
    """The number of calls of one kind, their total duration in seconds, and the number that failed."""

    calls: int = 0
    seconds: float = 0.0
    errors: int = 0

    def add(self, seconds: float, *, failed: bool) -> None:
        """Count one more call."""
        self.calls += 1
        self.seconds += seconds
        self.errors += failed


@dataclass(slots=True)
class Calls:
    """The calls of one plugin, by method."""

    by_method: dict[str, CallCount] = field(default_factory=dict)
    last_error: str = ""

    def count(self, method: str) -> CallCount:
        """The count of one method."""
        return self.by_method.setdefault(method, CallCount())


class CallTotals:
    """The calls of all plugins since the agent's start, by title and method.

    Plugins choose their names. So after some hundred names, further plugins are counted together as ``others``.
    """

    def __init__(self) -> None:
        self._by_title: dict[str, dict[str, CallCount]] = {}

    def count(self, title: str, method: str) -> CallCount:
        """The count of one method of a plugin."""
        if title not in self._by_title and len(self._by_title) >= _MAX_TITLES:
            title = _OTHERS
        return self._by_title.setdefault(title, {}).setdefault(method, CallCount())

    def __iter__(self) -> Iterator[tuple[str, str, CallCount]]:
        for title, methods in self._by_title.items():
            for method, count in methods.items():
                yield title, method, count
