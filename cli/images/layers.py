"""The layers of a pull in the agent's messages."""

from __future__ import annotations

from collections.abc import Sequence

from cli.text import size
from proto.podkeel.v1 import agent_pb2


def sums(layers: Sequence[agent_pb2.LayerProgress]) -> tuple[int, int]:
    """Bytes received of all layers, and the size of all layers."""
    return sum(layer.received for layer in layers), sum(layer.size for layer in layers)


def reused(layers: Sequence[agent_pb2.LayerProgress]) -> str:
    """How much of the layers was not fetched, to be appended to a line; empty if nothing."""
    amount = sum(layer.reused for layer in layers)
    return f", {size(amount)} of it reused" if amount else ""


def digest_of(layer: agent_pb2.LayerProgress) -> str:
    """The beginning of the layer's digest, to be shown."""
    return layer.digest.partition(":")[2][:12]
