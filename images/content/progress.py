"""The progress of pulls, which clients can query while they run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

from images.content.ingest import PartialBlob
from images.content.layer_source import LayerSource, Tally
from images.content.slots import Slot


class LayerState(Enum):
    """``WAITING`` for a slot, ``RUNNING`` while it is fetched and unpacked, ``DONE`` once it is on the node."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class LayerProgress:
    """The progress of one layer of a pull. ``size`` and ``received`` are compressed bytes."""

    digest: str
    state: LayerState
    size: int
    received: int
    tally: Tally = field(default_factory=Tally)

    @property
    def reused(self) -> int:
        """The bytes that were not fetched, as kept layers had them."""
        return min(self.tally.reused, self.size)


@dataclass(frozen=True, slots=True)
class PullProgress:
    """The progress of one pull. ``started`` is in nanoseconds since the epoch.

    ``layers`` is empty until the manifest has been received.
    """

    reference: str
    started: int
    layers: tuple[LayerProgress, ...]


@dataclass(slots=True)
class RunningPull:
    """A pull that is running. ``sources`` are set once its manifest has been received."""

    reference: str
    started: int = field(default_factory=time.time_ns)
    sources: Sequence[LayerSource] = ()


@dataclass(slots=True, eq=False)
class Transfer:
    """The transfer of one layer. ``received`` is None until the transfer has a slot and begins."""

    source: LayerSource
    received: int | None = None

    def took(self, size: int, *, from_node: bool = False) -> None:
        """Count bytes of the layer. ``from_node``: a partial pull took them from kept blobs."""
        self.received = (self.received or 0) + size
        if from_node:
            self.source.tally.reused += size

    async def chunks(self, partial: PartialBlob | None, slot: Slot) -> AsyncGenerator[bytes, None]:
        """The chunks of the layer, counted: first those on the disk, then those from the network.

        ``slot`` measures the rate of the latter.
        """
        self.received = self.source.tally.reused = 0
        begin = partial.size if partial is not None else 0
        if partial is not None:
            async with contextlib.aclosing(partial.chunks()) as chunks:
                async for chunk in chunks:
                    self.received += len(chunk)
                    yield chunk
        if 0 < begin == self.source.descriptor.size:
            return
        async with contextlib.aclosing(slot.watched(self.source.chunks(begin))) as chunks:
            async for chunk in chunks:
                self.received += len(chunk)
                yield chunk


class Transfers:
    """The layers that are being fetched, by chain ID and registry."""

    def __init__(self) -> None:
        self._transfers: dict[tuple[str, str], Transfer] = {}

    @contextmanager
    def making(self, source: LayerSource) -> Iterator[Transfer]:
        """Register a transfer of the layer until the block ends."""
        transfer = self._transfers[source.key] = Transfer(source)
        try:
            yield transfer
        finally:
            if self._transfers.get(source.key) is transfer:  # otherwise a later transfer has replaced it
                del self._transfers[source.key]

    def progress(self, source: LayerSource, *, there: bool) -> LayerProgress:
        """The progress of the layer. ``there`` says that it is unpacked."""
        size = source.descriptor.size
        transfer = self._transfers.get(source.key)
        received = transfer.received if transfer is not None else None
        if there:
            return LayerProgress(source.descriptor.digest, LayerState.DONE, size, size, source.tally)
        state = LayerState.WAITING if received is None else LayerState.RUNNING
        return LayerProgress(source.descriptor.digest, state, size, min(received or 0, size), source.tally)
