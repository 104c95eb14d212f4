"""Whether pods can be connected to the network, and what is wrong with it."""

from __future__ import annotations

import msgspec


class Condition(msgspec.Struct, frozen=True):
    """Whether pods can be connected, and if not why, in the terms of the CRI's NetworkReady."""

    ready: bool
    reason: str = ""
    message: str = ""


class Finding(msgspec.Struct, frozen=True):
    """One difference: the kind of object, its name, and the problem."""

    kind: str
    object: str
    problem: str
