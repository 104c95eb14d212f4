"""Whether pods can be connected to the network."""

from __future__ import annotations

import msgspec


class Condition(msgspec.Struct, frozen=True):
    """Whether pods can be connected, and if not why, in the terms of the CRI's NetworkReady."""

    ready: bool
    reason: str = ""
    message: str = ""
