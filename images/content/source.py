"""An image that is about to be installed: its manifest and config, and how to read its layers."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from host.errors import InvalidArgumentError
from images.content.layer_source import LayerSource, RelatedBlobs
from images.content.slots import Origin
from images.image import ConfigFile
from images.oci import digests
from images.oci.manifests import Descriptor


@dataclass(frozen=True, slots=True)
class Candidate:
    """``names`` are the tags and digest references it gets. ``open_layer`` transfers a layer, starting at a byte of it.

    ``transferred`` returns the bytes of layers received over the network so far. ``resumable`` and ``related`` are as
    in LayerSource; ``open_range`` transfers the bytes of a layer from the first number to before the second.
    """

    subject: str
    manifest: bytes
    manifest_digest: str
    config: ConfigFile
    layers: tuple[Descriptor, ...]
    names: tuple[str, ...]
    open_layer: Callable[[Descriptor, int], AsyncGenerator[bytes, None]]
    transferred: Callable[[], int] = lambda: 0
    resumable: bool = False
    origin: Origin = field(default_factory=Origin)
    open_range: Callable[[Descriptor, int, int], AsyncGenerator[bytes, None]] | None = None
    related: RelatedBlobs = field(default_factory=RelatedBlobs)

    @property
    def id(self) -> str:
        """The digest of its configuration."""
        return self.config.digest

    def layer_sources(self) -> list[LayerSource]:
        """One per layer, lowest first. InvalidArgumentError if manifest and configuration have different numbers."""
        diff_ids = self.config.diff_ids
        if len(diff_ids) != len(self.layers):
            raise InvalidArgumentError(
                f"{self.subject} is broken: its manifest has {len(self.layers)} layers, its config {len(diff_ids)}"
            )
        chain = digests.chain_ids(diff_ids)
        return [
            LayerSource(
                descriptor,
                diff_ids[index],
                chain[index],
                functools.partial(self.open_layer, descriptor),
                f"{self.subject}: layer {index + 1} of {len(diff_ids)} ({descriptor.digest or diff_ids[index]})",
                self.resumable,
                self.origin,
                functools.partial(self.open_range, descriptor) if self.open_range is not None else None,
                self.related,
            )
            for index, descriptor in enumerate(self.layers)
        ]
