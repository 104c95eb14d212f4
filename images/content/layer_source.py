"""A layer that an image needs: its expected digests, and its source."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Hashable
from dataclasses import dataclass, field

from images.content.slots import Origin
from images.oci.manifests import Descriptor


@dataclass(frozen=True, slots=True)
class RelatedBlobs:
    """Digests of kept blobs that may have files of a missing layer, the latest first.

    They are of images of the same registry: ``near`` of the same repository, ``far`` of others.
    """

    near: tuple[str, ...] = ()
    far: tuple[str, ...] = ()


@dataclass(slots=True)
class Tally:
    """What a transfer took from this node: ``reused`` bytes."""

    reused: int = 0


@dataclass(frozen=True, slots=True)
class LayerSource:
    """The source of a missing layer: its expected digests, and a function that starts its transfer at a byte.

    If it is ``resumable``, the bytes of an interrupted transfer are kept. ``ranges`` starts the transfer of the bytes
    from the first number to before the second; None if the source has no ranges.
    """

    descriptor: Descriptor
    diff_id: str
    chain_id: str
    chunks: Callable[[int], AsyncGenerator[bytes, None]]
    subject: str
    resumable: bool
    origin: Origin = field(default_factory=Origin)
    ranges: Callable[[int, int], AsyncGenerator[bytes, None]] | None = None
    related: RelatedBlobs = field(default_factory=RelatedBlobs)
    tally: Tally = field(default_factory=Tally)

    @property
    def key(self) -> tuple[str, str]:
        """Equal for pulls that need the layer from the same registry."""
        return self.chain_id, self.origin.registry

    @property
    def wanted(self) -> tuple[Hashable, ...]:
        """What pulls of this layer wait for: the layer itself, and its blob."""
        return (self.key, *filter(None, (self.descriptor.digest,)))
