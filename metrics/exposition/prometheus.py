"""The metrics as text for Prometheus.

prometheus-client writes the agent's own metrics. A separate writer is used for those of containers: 200 containers have
15,000 samples, and prometheus-client would build an object for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import msgspec

from metrics.instruments import Computed, Counter, Histogram, Instrument
from metrics.samples import BASE_LABELS, Kind, Labels, Metric, Snapshot

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric as Family

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPEN_METRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


class Page(msgspec.Struct, frozen=True):
    """The body of an HTTP response and its content type."""

    content_type: str
    body: bytes


def wants_open_metrics(accept: str) -> bool:
    """Whether a client's Accept header contains OpenMetrics. Prometheus names it first when it wants it."""
    return any(part.split(";")[0].strip() == "application/openmetrics-text" for part in accept.split(","))


# For each combination of label values, a number, or a histogram's buckets and sum.
Rows = list[tuple[tuple[str, ...], Any]]
# An instrument with its numbers at one moment; with None if they can only be read on a thread.
Gathered = list[tuple[Instrument, Rows | None]]


def gather(instruments: Iterable[Instrument]) -> Gathered:
    """Copy the numbers. Call it on the event loop, which changes them."""
    return [(instrument, _rows(instrument)) for instrument in instruments]


def _rows(instrument: Instrument) -> Rows | None:
    if isinstance(instrument, Histogram):
        return [(labels, instrument.buckets(labels)) for labels in instrument.series]
    if isinstance(instrument, Computed):
        return None if instrument.blocks else list(instrument.read())
    return list(instrument.values.items())


def _rows_from_disk(instrument: Instrument) -> Rows:
    if not isinstance(instrument, Computed):
        return []
    try:
        return list(instrument.read())
    except OSError:  # a failing disk only removes its own metrics, so that others can show its effects
        return []


class AgentPage:
    """Writes the agent's metrics: the gathered ones, those read from disks, and those of the process and of Python.

    One thread may use it at a time. The first scrape imports prometheus-client (5 MiB).
    """

    def __init__(self) -> None:
        self._gathered: list[tuple[Instrument, Rows]] = []
        self._registry: CollectorRegistry | None = None

    def render(self, gathered: Gathered, accept: str) -> Page:
        """The page for a client with this Accept header."""
        from prometheus_client.exposition import generate_latest
        from prometheus_client.openmetrics import exposition as openmetrics

        self._gathered = [(item, _rows_from_disk(item) if rows is None else rows) for item, rows in gathered]
        registry = self._registry or self._make_registry()
        if wants_open_metrics(accept):
            write: Callable[[CollectorRegistry], bytes] = openmetrics.generate_latest
            return Page(OPEN_METRICS, write(registry))
        return Page(TEXT, generate_latest(registry))

    def collect(self) -> Iterable[Family]:
        """The collector that prometheus-client calls at a scrape."""
        return [_family(instrument, rows) for instrument, rows in self._gathered]

    def _make_registry(self) -> CollectorRegistry:
        from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

        registry = self._registry = CollectorRegistry(auto_describe=False)
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)
        registry.register(self)
        return registry


def _family(instrument: Instrument, rows: Rows) -> Family:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    name, text, labels = instrument.name, instrument.help, instrument.labels
    if isinstance(instrument, Histogram):
        histogram = HistogramMetricFamily(name, text, labels=labels)
        for values, (buckets, total) in rows:
            histogram.add_metric(values, buckets, total)
        return histogram
    counts = isinstance(instrument, Counter) or (isinstance(instrument, Computed) and instrument.counter)
    family = (CounterMetricFamily if counts else GaugeMetricFamily)(name, text, labels=labels)
    for values, number in rows:
        family.add_metric(values, number)
    return family


def containers_page(metrics: Sequence[Metric], entries: Sequence[tuple[Labels, Snapshot]], accept: str = "") -> Page:
    """The containers' metrics with kubelet's labels. Takes some milliseconds per hundred containers, on any thread.

    Samples have no timestamps, so that Prometheus ends a series as soon as its container is gone.
    """
    open_metrics = wants_open_metrics(accept)
    prepared = [(_label_text(BASE_LABELS, labels.values()), snapshot) for labels, snapshot in entries]
    lines: list[str] = []
    for metric in metrics:
        name = metric.name
        keys = metric.labels
        begin = len(lines)
        for base, snapshot in prepared:
            for own, value in metric.samples(snapshot):
                more = f",{_own_label_text(keys, own)}" if own else ""
                lines.append(f"{name}{{{base}{more}}} {value!r}\n")
        if len(lines) > begin:
            lines.insert(begin, _header(metric, open_metrics))
    if open_metrics:
        lines.append("# EOF\n")
    return Page(OPEN_METRICS if open_metrics else TEXT, "".join(lines).encode())


def _header(metric: Metric, open_metrics: bool) -> str:
    name, kind = metric.name, metric.kind.name.lower()
    if open_metrics and metric.kind is Kind.COUNTER:
        # In OpenMetrics a counter's family has no suffix. A counter without the suffix has the type unknown.
        name, kind = (name[: -len("_total")], kind) if name.endswith("_total") else (name, "unknown")
    return f"# HELP {name} {metric.help}\n# TYPE {name} {kind}\n"


def _label_text(keys: Sequence[str], values: Sequence[str]) -> str:
    return ",".join([f'{key}="{_escaped(value)}"' for key, value in zip(keys, values, strict=True)])


_own_label_text = lru_cache(1024)(_label_text)  # devices, interfaces, states: few different ones


def _escaped(value: str) -> str:
    if "\\" in value or '"' in value or "\n" in value:
        return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return value
