"""The metrics of the agent itself."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Sequence

from metrics.instruments import Computed, Counter, Gauge, Histogram, Instrument

LAG_INTERVAL = 0.5
PULL_BUCKETS = (0.05, 0.25, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


class AgentMetrics:
    """The agent's instruments. The owner of a number updates it here, or registers a function that computes it."""

    def __init__(self) -> None:
        self.calls = Counter("podkeel_calls_total", "Calls ended, by method and gRPC code.", ("method", "code"))
        self.call_seconds = Histogram("podkeel_call_seconds", "Duration of calls.", ("method",))
        self.calls_in_flight = Gauge("podkeel_calls_in_flight", "Calls being served.", ("method",))
        self.stage_seconds = Histogram(
            "podkeel_stage_seconds", "Duration of the stages of operations.", ("operation", "stage")
        )
        self.stage_failures = Counter(
            "podkeel_stage_failures_total", "Stages that failed or were cancelled.", ("operation", "stage")
        )
        self.pulls = Counter("podkeel_image_pulls_total", "Image pulls, by result.", ("result",))
        self.pull_seconds = Histogram("podkeel_image_pull_seconds", "Duration of image pulls.", bounds=PULL_BUCKETS)
        self.loop_lag = Histogram(
            "podkeel_event_loop_lag_seconds",
            "How late the event loop returned from a sleep.",
            bounds=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0),
        )
        self._computed: list[Computed] = []
        self._lag_task: asyncio.Task[None] | None = None

    @property
    def instruments(self) -> list[Instrument]:
        """All instruments, in the order of the page."""
        own = (value for value in vars(self).values() if isinstance(value, Counter | Gauge | Histogram))
        return [*own, *self._computed]

    def call_began(self, method: str) -> None:
        """Count a call that begins."""
        self.calls_in_flight.add(method)

    def call_ended(self, method: str, code: str, seconds: float) -> None:
        """Count a call that ended with this gRPC code (by name) after ``seconds``."""
        self.calls_in_flight.add(method, amount=-1.0)
        self.calls.add(method, code)
        self.call_seconds.observe(seconds, method)

    def stage(self, operation: str, stage: str, seconds: float, failed: bool = False) -> None:
        """Record a stage that ended."""
        self.stage_seconds.observe(seconds, operation, stage)
        if failed:
            self.stage_failures.add(operation, stage)

    def compute(
        self,
        name: str,
        help_text: str,
        labels: Sequence[str],
        read: Callable[[], Iterable[tuple[tuple[str, ...], float]]],
        *,
        counter: bool = False,
        blocks: bool = False,
    ) -> None:
        """Add a metric whose values ``read`` returns at each scrape, as described for Computed."""
        self._computed.append(Computed(name, help_text, labels, read, counter=counter, blocks=blocks))

    def watch_loop(self) -> None:
        """Start to measure the running event loop, twice a second, until ``close``."""
        self._lag_task = asyncio.get_running_loop().create_task(self._measure_lag(), name="event-loop-lag")

    async def close(self) -> None:
        """Stop measuring the event loop."""
        if self._lag_task is not None:
            self._lag_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._lag_task

    async def _measure_lag(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_INTERVAL
            await asyncio.sleep(LAG_INTERVAL)
            self.loop_lag.observe(max(0.0, loop.time() - due))
