"""Limits the size of plugins' answers, and processes large ones in a thread."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import ParamSpec, TypeVar

from google.protobuf.message import Message

from host.concurrency.threads import in_thread
from host.errors import InvalidArgumentError

MOST_BYTES = 1 << 20
MOST_ENTRIES = 1024  # of one list or map
MOST_UPDATES = 4096

_LARGE_BYTES = 4096

P = ParamSpec("P")
T = TypeVar("T")


def check_size(plugin: str, answer: Message) -> None:
    """Raise InvalidArgumentError for what is too large, has a list that is too long, or text with NUL bytes."""
    size = answer.ByteSize()
    if size > MOST_BYTES:
        raise InvalidArgumentError(f"NRI plugin {plugin} answers {size} bytes of changes: {MOST_BYTES} are the most")
    if size > _LARGE_BYTES or b"\0" in answer.SerializeToString():  # which may be a length, so it is looked for
        _check_parts(plugin, answer)


def _check_parts(plugin: str, message: Message) -> None:
    for field, value in message.ListFields():
        if isinstance(value, Message):
            _check_parts(plugin, value)
        elif isinstance(value, Collection) and not isinstance(value, str | bytes):
            if len(value) > MOST_ENTRIES:
                what = f"{len(value)} entries of {field.name}: {MOST_ENTRIES} are the most"
                raise InvalidArgumentError(f"NRI plugin {plugin} answers {what}")
            parts = (*value, *value.values()) if isinstance(value, Mapping) else value
            for part in parts:
                if isinstance(part, Message):
                    _check_parts(plugin, part)
                else:
                    _check_text(plugin, field.name, part)
        else:
            _check_text(plugin, field.name, value)


def _check_text(plugin: str, field: str, value: object) -> None:
    """What comes after a NUL byte would be left out by OCI runtimes."""
    if isinstance(value, str) and "\0" in value:
        raise InvalidArgumentError(f"NRI plugin {plugin} answers a NUL byte in {field}: {value[:64]!r}")


def check_updates(plugin: str, updates: Sequence[Message]) -> None:
    """The same for updates of containers."""
    if len(updates) > MOST_UPDATES:
        raise InvalidArgumentError(f"NRI plugin {plugin} asks for more than {MOST_UPDATES} updates at once")
    for update in updates:
        check_size(plugin, update)


async def by_size(answer: Message, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do ``work`` with an answer: in a thread if the answer is large."""
    if answer.ByteSize() > _LARGE_BYTES:
        return await in_thread(work, *args, **kwargs)
    return work(*args, **kwargs)
