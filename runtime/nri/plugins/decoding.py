"""Parses messages of plugins. Large ones are parsed in a thread, one at a time, after their fields are counted."""

from __future__ import annotations

import asyncio
from typing import TypeVar, cast

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from host.concurrency.threads import in_thread
from runtime.nri.answers.wire_check import check_wire

LARGE_BYTES = 32 << 10  # any content up to this size can be parsed in about a millisecond

M = TypeVar("M", bound=Message)


class Decoder:
    """Parses the messages of all plugins of an agent."""

    def __init__(self) -> None:
        self._large = asyncio.Lock()

    async def decode(self, kind: type[M], data: bytes) -> M:
        """Parse a message. Raises DecodeError, and InvalidArgumentError for a message that has too many fields."""
        if len(data) <= LARGE_BYTES:
            return kind.FromString(data)
        async with self._large:
            return await in_thread(_checked, kind, data)


def _checked(kind: type[M], data: bytes) -> M:
    check_wire(data, cast(Descriptor, kind.DESCRIPTOR))
    return kind.FromString(data)
