"""Limits the size of plugins' answers, and processes large answers in a thread."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import ParamSpec, TypeVar

from google.protobuf.message import Message

from host.concurrency.threads import in_thread
from host.errors import InvalidArgumentError

MAX_BYTES = 1 << 20
MAX_ENTRIES = 1024  # of one list or map
MAX_UPDATES = 4096

_LARGE_BYTES = 4096

P = ParamSpec("P")
T = TypeVar("T")


def check_size(plugin: str, answer: Message) -> None:
    """Raise InvalidArgumentError for an answer that is too large, has too long a list, or has text with NUL bytes."""
    size = answer.ByteSize()
    if size > MAX_BYTES:
        raise InvalidArgumentError(f"NRI plugin {plugin} answers {size} bytes of changes: the limit is {MAX_BYTES}")
    if size > _LARGE_BYTES or b"\0" in answer.SerializeToString():  # a zero byte may also be a length: check the text
        _check_parts(plugin, answer)


def _check_parts(plugin: str, message: Message) -> None:
    for field, value in message.ListFields():
        if isinstance(value, Message):
            _check_parts(plugin, value)
        elif isinstance(value, Collection) and not isinstance(value, str | bytes):
            if len(value) > MAX_ENTRIES:
                what = f"{len(value)} entries of {field.name}: the limit is {MAX_ENTRIES}"
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
    """Refuse a NUL byte: OCI runtimes would drop the text behind it."""
    if isinstance(value, str) and "\0" in value:
        raise InvalidArgumentError(f"NRI plugin {plugin} answers a NUL byte in {field}: {value[:64]!r}")


def check_updates(plugin: str, updates: Sequence[Message]) -> None:
    """Raise InvalidArgumentError for too many updates of containers, or for one that is too large."""
    if len(updates) > MAX_UPDATES:
        raise InvalidArgumentError(f"NRI plugin {plugin} asks for more than {MAX_UPDATES} updates at once")
    for update in updates:
        check_size(plugin, update)


async def by_size(answer: Message, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do ``work`` with an answer; in a thread if the answer is large."""
    if answer.ByteSize() > _LARGE_BYTES:
        return await in_thread(work, *args, **kwargs)
    return work(*args, **kwargs)
