"""Counters, gauges and histograms that cost one dictionary update each. A scrape converts them to text."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)


class _Numbers:
    """A number per combination of label values."""

    def __init__(self, name: str, help_text: str, labels: Sequence[str] = ()) -> None:
        self.name = name
        self.help = help_text
        self.labels = tuple(labels)
        self.values: dict[tuple[str, ...], float] = {} if labels else {(): 0.0}

    def add(self, *labels: str, amount: float = 1.0) -> None:
        """Add ``amount``; on the event loop."""
        self.values[labels] = self.values.get(labels, 0.0) + amount


class Counter(_Numbers):
    """An increasing number per combination of label values. Its name ends with ``_total``."""


class Gauge(_Numbers):
    """A number per combination of label values that increases and decreases."""

    def set(self, value: float, *labels: str) -> None:
        """Set it; on the event loop."""
        self.values[labels] = value


class Histogram:
    """The number of observations in each bucket and their sum, per combination of label values."""

    def __init__(
        self, name: str, help_text: str, labels: Sequence[str] = (), bounds: Sequence[float] = LATENCY_BUCKETS
    ) -> None:
        self.name = name
        self.help = help_text
        self.labels = tuple(labels)
        self.bounds = tuple(bounds)
        self.series: dict[tuple[str, ...], list[float]] = {} if labels else {(): self._empty()}

    def observe(self, value: float, *labels: str) -> None:
        """Add one observation; on the event loop."""
        series = self.series.get(labels)
        if series is None:
            series = self.series[labels] = self._empty()
        series[bisect_left(self.bounds, value)] += 1
        series[-1] += value

    def _empty(self) -> list[float]:
        """One count per bound, one for larger values, and the sum."""
        return [0.0] * (len(self.bounds) + 2)

    def buckets(self, labels: tuple[str, ...]) -> tuple[list[tuple[str, float]], float]:
        """Cumulative counts by upper bound in Prometheus's form, and the sum."""
        *counts, total = self.series[labels]
        cumulated = 0.0
        rows = []
        for bound, count in zip((*self.bounds, float("inf")), counts, strict=True):
            cumulated += count
            rows.append(("+Inf" if bound == float("inf") else repr(bound), cumulated))
        return rows, total


class Computed:
    """A metric whose label values and numbers ``read`` returns at each scrape.

    ``read`` is called on the event loop; on a thread if it ``blocks``. Then it may wait for disks and raise OSError.
    """

    def __init__(
        self,
        name: str,
        help_text: str,
        labels: Sequence[str],
        read: Callable[[], Iterable[tuple[tuple[str, ...], float]]],
        *,
        counter: bool = False,
        blocks: bool = False,
    ) -> None:
        self.name = name
        self.help = help_text
        self.labels = tuple(labels)
        self.read = read
        self.counter = counter
        self.blocks = blocks


Instrument = Counter | Gauge | Histogram | Computed
