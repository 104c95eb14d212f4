"""Reads and writes the images of CRIU that describe the processes of a checkpoint."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from host.errors import InvalidArgumentError

M = TypeVar("M", bound=Message)

_MAX_IMAGE_BYTES = 64 << 20
_MAX_ENTRIES = 100_000
_SIZE = struct.Struct("<I")
_MAGIC = 8  # bytes: two magic numbers before the first entry
INVENTORY_MAGIC = 4  # the inventory has one magic number


def entries(path: Path, kind: type[M], magic: int = _MAGIC, most: int = _MAX_ENTRIES) -> Iterator[M]:
    """The entries of an image; a missing image has none. Raises InvalidArgumentError for one that is broken."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    with os.fdopen(descriptor, "rb") as file:
        content = file.read(_MAX_IMAGE_BYTES + 1)
    if len(content) > _MAX_IMAGE_BYTES:
        raise InvalidArgumentError(f"the checkpoint's {path.name} is larger than {_MAX_IMAGE_BYTES} bytes")
    position = magic
    for _ in range(most):
        if position >= len(content):
            return
        if position + _SIZE.size > len(content):
            break
        (size,) = _SIZE.unpack_from(content, position)
        position += _SIZE.size
        if position + size > len(content):
            break
        try:
            yield kind.FromString(content[position : position + size])
        except DecodeError as error:
            raise InvalidArgumentError(f"the checkpoint's {path.name} is broken: {error}") from error
        position += size
    raise InvalidArgumentError(f"the checkpoint's {path.name} is broken: it is cut off, or has too many entries")


def write(path: Path, begin: bytes, *messages: Message) -> None:
    """Write an image with these entries after the magic numbers ``begin``."""
    encoded = [message.SerializeToString() for message in messages]
    path.write_bytes(begin + b"".join(_SIZE.pack(len(entry)) + entry for entry in encoded))
