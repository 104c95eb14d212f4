"""Decodes JSON of registries, images, plugins and OCI runtimes, with limits of size, depth and number of values.

Deep nesting can make a recursive decoder fail at any point. A text of many small values takes fifty times its size in
memory. So the text is checked in pieces before it is decoded, and other threads can run in between.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import TypeVar

import msgspec

T = TypeVar("T")

MAX_BYTES = 1 << 20
MAX_VALUES = 50_000
DEEPEST = 64

_PIECE = 16 << 10
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL
)
_OPENING = b"[{"
_OTHERS = bytes(set(range(256)) - set(b"[]{},"))


class JsonError(ValueError):
    """The text is not JSON, does not have the requested form, or exceeds a limit."""


def decode(
    content: bytes,
    kind: type[T],
    *,
    max_bytes: int = MAX_BYTES,
    max_values: int = MAX_VALUES,
    any_text: bool = False,
) -> T:
    """Decode ``content`` as ``kind`` (a type of msgspec). Raises JsonError.

    ``any_text``: bytes that are not UTF-8 and single surrogates in strings become U+FFFD, as in Go.

    Limits: ``max_bytes``, about ``max_values`` members and items, and DEEPEST nested objects and lists. More than
    some 32 KiB block the event loop: decode them in a thread.
    """
    if len(content) > max_bytes:
        raise JsonError(f"it is larger than {max_bytes} bytes")
    _check_shape(content, max_values)
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        if any_text and (valid := valid_text(content)) != content:
            return decode(valid, kind, max_bytes=len(valid), max_values=max_values)
        raise JsonError(str(error)) from error


def valid_text(content: bytes) -> bytes:
    """The same JSON with U+FFFD in place of bytes that are not UTF-8, and of single surrogates."""
    valid = content.decode(errors="replace").encode()
    return _ESCAPE.sub(lambda match: rb"\ufffd" if match[1] else match[0], valid)


def read_file(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of a regular file, also through links. Raises OSError, or JsonError if it is too large or no file.

    A FIFO or a device is refused without waiting for it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise JsonError("it is not a regular file")
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise JsonError(f"it is larger than {max_bytes} bytes")
    return content


def _check_shape(content: bytes, max_values: int) -> None:
    openings = content.count(b"[") + content.count(b"{")
    if openings <= DEEPEST and openings + content.count(b",") <= max_values:
        return  # so short a text cannot exceed the limits
    values = depth = begin = 0
    inside = False  # inside a string
    while begin < len(content):
        piece = content[begin : begin + _PIECE]
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2:  # the piece ends inside an escape
            piece = content[begin : begin + _PIECE + 1]
        begin += len(piece)
        if b"\\" in piece:
            piece = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
        parts = piece.split(b'"')
        marks = b"".join(parts[inside::2]).translate(None, _OTHERS)
        inside ^= len(parts) % 2 == 0
        brackets = marks.translate(None, b",")
        values += len(marks) - len(brackets)
        for bracket in brackets:
            opens = bracket in _OPENING
            values += opens
            depth += 1 if opens else -1
            if depth > DEEPEST:
                raise JsonError(f"it nests more than {DEEPEST} objects and lists within each other")
            if depth < 0:
                return  # it is not JSON: the decoder's message is better
        if values > max_values:
            raise JsonError(f"it has more than {max_values} values")
