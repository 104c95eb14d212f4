"""A layer that an image needs: what it must be, and where it comes from."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from images.manifests import Descriptor


@dataclass(frozen=True, slots=True)
class LayerSource:
    """Where a missing layer comes from: what it must be, and how to begin its transfer, from that byte on.

    What came of one that is ``resumable`` before its transfer broke off is worth keeping.
    """

    descriptor: Descriptor
    diff_id: str
    chain_id: str
    below: tuple[str, ...]  # chain ids of the layers below, lowest first
    chunks: Callable[[int], AsyncGenerator[bytes, None]]
    subject: str
    resumable: bool
