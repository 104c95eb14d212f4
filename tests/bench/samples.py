"""Durations by name, and their percentiles."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec


class Summary(msgspec.Struct, frozen=True):
    """A summary of durations, in milliseconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float


def percentile(values: Sequence[float], fraction: float) -> float:
    """The value below which ``fraction`` of ``values`` are, interpolated between the nearest two; nan without values.

    With fewer than a hundred values p99 is close to the largest one.
    """
    if not values:
        return math.nan
    ordered = sorted(values)
    position = (len(ordered) - 1) * fraction
    below = math.floor(position)
    above = math.ceil(position)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def summarize(values: Sequence[float]) -> Summary:
    """Percentiles of ``values``."""
    mean = sum(values) / len(values) if values else math.nan
    return Summary(len(values), mean, *(percentile(values, fraction) for fraction in (0.5, 0.9, 0.99)))


class Samples:
    """Durations in milliseconds by name. Several threads may add."""

    def __init__(self) -> None:
        self.values: defaultdict[str, list[float]] = defaultdict(list)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the duration of the block, unless it failed."""
        begin = time.perf_counter_ns()
        yield
        self.values[name].append((time.perf_counter_ns() - begin) / 1e6)

    def add(self, name: str, milliseconds: float) -> None:
        """Add one duration."""
        self.values[name].append(milliseconds)

    def p50(self, name: str) -> float:
        """The median of ``name``."""
        return percentile(self.values.get(name, ()), 0.5)

    def summaries(self) -> dict[str, Summary]:
        """Every name with its percentiles."""
        return {name: summarize(values) for name, values in self.values.items()}
