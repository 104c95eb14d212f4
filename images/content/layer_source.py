"""A layer that an image needs: what it must be, and its source."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Hashable
from dataclasses import dataclass, field

from images.content.slots import Origin
from images.oci.manifests import Descriptor


@dataclass(frozen=True, slots=True)
class LayerSource:
    """The source of a missing layer: what it must be, and how to begin its transfer at a byte.

    If it is ``resumable``, the bytes of a broken transfer are kept.
    """

    descriptor: Descriptor
    diff_id: str
    chain_id: str
    chunks: Callable[[int], AsyncGenerator[bytes, None]]
    subject: str
    resumable: bool
    origin: Origin = field(default_factory=Origin)

    @property
    def key(self) -> tuple[str, str]:
        """Equal for pulls that need the layer from the same registry."""
        return self.chain_id, self.origin.registry

    @property
    def wanted(self) -> tuple[Hashable, ...]:
        """The objects that pulls of this layer wait for: the layer itself, and its blob."""
        return (self.key, *filter(None, (self.descriptor.digest,)))
