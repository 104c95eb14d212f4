"""Messages of plugins, parsed: large ones in a thread, one at a time, after a look at their number of fields."""

from __future__ import annotations

import asyncio
from typing import TypeVar, cast

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from host.concurrency.threads import in_thread
from runtime.nri.answers.wire_check import check_wire

LARGE_BYTES = 32 << 10  # what can be parsed in about a millisecond, with any content

M = TypeVar("M", bound=Message)


class Decoder:
    """Parses the messages of all plugins of an agent."""

    def __init__(self) -> None:
        self._large = asyncio.Lock()

    async def decode(self, kind: type[M], data: bytes) -> M:
        """The message. Raises DecodeError, and InvalidArgumentError for one that has too many parts."""
        if len(data) <= LARGE_BYTES:
            return kind.FromString(data)
        async with self._large:
            return await in_thread(_checked, kind, data)


def _checked(kind: type[M], data: bytes) -> M:
    check_wire(data, cast(Descriptor, kind.DESCRIPTOR))
    return kind.FromString(data)
