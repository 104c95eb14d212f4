"""Types that describe container metrics: name, labels and kind, and the function that computes the values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum

import msgspec

from metrics.stats import FilesystemReading, NetworkReading, ProcessesReading, Reading

BASE_LABELS = ("container", "id", "image", "name", "namespace", "pod")


class Kind(Enum):
    """Whether a metric only increases. The numbers are those of the CRI's MetricType."""

    COUNTER = 0
    GAUGE = 1


class Snapshot(msgspec.Struct, frozen=True):
    """The data of one container or one pod at one moment. Without a reading there are no samples."""

    seen_ns: int
    reading: Reading | None = None
    started_ns: int | None = None
    network: NetworkReading | None = None
    processes: ProcessesReading | None = None
    filesystem: FilesystemReading | None = None


class Labels(msgspec.Struct, frozen=True):
    """Values of the labels that every metric has, with kubelet's names. Empty if they do not apply."""

    container: str = ""
    id: str = ""
    image: str = ""
    name: str = ""
    namespace: str = ""
    pod: str = ""

    def values(self) -> tuple[str, ...]:
        """The values in the order of ``BASE_LABELS``."""
        return (self.container, self.id, self.image, self.name, self.namespace, self.pod)


# The values of the metric's own labels, and the value in the metric's unit (seconds have fractions).
Sample = tuple[tuple[str, ...], float]


class Metric(msgspec.Struct, frozen=True):
    """One metric: its description, and a function that returns its samples from a snapshot."""

    name: str
    help: str
    kind: Kind
    labels: tuple[str, ...]
    samples: Callable[[Snapshot], Iterable[Sample]]

    @property
    def label_keys(self) -> tuple[str, ...]:
        """All labels in the order of the values: those of every metric, then the metric's own."""
        return BASE_LABELS + self.labels
