"""The layers of a pull, as messages of the agent have them."""

from __future__ import annotations

from collections.abc import Sequence

from proto.podkeel.v1 import agent_pb2


def sums(layers: Sequence[agent_pb2.LayerProgress]) -> tuple[int, int]:
    """Bytes that are received, and bytes of all."""
    return sum(layer.received for layer in layers), sum(layer.size for layer in layers)


def digest_of(layer: agent_pb2.LayerProgress) -> str:
    """The beginning of its digest, for people."""
    return layer.digest.partition(":")[2][:12]
