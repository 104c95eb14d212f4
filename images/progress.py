"""How far pulls are, as it can be asked for while they run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

from images.layer_source import LayerSource
from images.partials import PartialBlob


class LayerState(Enum):
    """``WAITING`` for its turn, ``RUNNING`` while it is fetched and unpacked, ``DONE`` once it is on the node."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class LayerProgress:
    """One layer of a pull; ``size`` and ``received`` are compressed bytes."""

    digest: str
    state: LayerState
    size: int
    received: int


@dataclass(frozen=True, slots=True)
class PullProgress:
    """One running pull; ``started`` in nanoseconds since the epoch, ``layers`` empty until the manifest is there."""

    reference: str
    started: int
    layers: tuple[LayerProgress, ...]


@dataclass(slots=True)
class RunningPull:
    """A pull as the store follows it; ``sources`` are known once its manifest is."""

    reference: str
    started: int = field(default_factory=time.time_ns)
    sources: Sequence[LayerSource] = ()


class Transfers:
    """The layers on their way to the node, by chain id, with the bytes that came."""

    def __init__(self) -> None:
        self._received: dict[str, int] = {}

    @contextmanager
    def making(self, source: LayerSource) -> Iterator[None]:
        """The layer is on its way, once its chunks are asked for, until the block ends."""
        try:
            yield
        finally:
            self._received.pop(source.chain_id, None)

    def chunks(self, source: LayerSource, partial: PartialBlob | None) -> AsyncGenerator[bytes, None]:
        """The chunks of the layer, what is there of it first, counted."""
        self._received[source.chain_id] = 0
        return self._counted(source, partial)

    async def _counted(self, source: LayerSource, partial: PartialBlob | None) -> AsyncGenerator[bytes, None]:
        begin = partial.size if partial is not None else 0
        if partial is not None:
            async with contextlib.aclosing(partial.chunks()) as chunks:
                async for chunk in chunks:
                    self._received[source.chain_id] += len(chunk)
                    yield chunk
        if 0 < begin == source.descriptor.size:
            return
        async with contextlib.aclosing(source.chunks(begin)) as chunks:
            async for chunk in chunks:
                self._received[source.chain_id] += len(chunk)
                yield chunk

    def progress(self, source: LayerSource, *, there: bool) -> LayerProgress:
        """How far the layer is, which ``there`` says is unpacked."""
        size = source.descriptor.size
        received = self._received.get(source.chain_id)
        if there:
            return LayerProgress(source.descriptor.digest, LayerState.DONE, size, size)
        state = LayerState.WAITING if received is None else LayerState.RUNNING
        return LayerProgress(source.descriptor.digest, state, size, received or 0)
