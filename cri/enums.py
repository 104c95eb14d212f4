"""Refuses requests with unknown enum values: protobuf accepts numbers that have no name."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from host.errors import InvalidArgumentError

_MAX_NAMES = 8


def require_known(message: Message, path: str = "") -> None:
    """Raise InvalidArgumentError for an enum in ``message``, or in a message inside, whose number has no name.

    It names the field and the number. ``path`` is where ``message`` is in the request.
    """
    for field in _enum_fields(message.DESCRIPTOR):
        for where, value in _values(message, field, f"{path}.{field.name}" if path else field.name):
            if field.enum_type is None:
                require_known(value, where)
            elif value not in field.enum_type.values_by_number:
                names = [item.name for item in field.enum_type.values]
                allowed = ", ".join(names[:_MAX_NAMES]) + (", …" if len(names) > _MAX_NAMES else "")
                raise InvalidArgumentError(f"{where}: {value} is not a {field.enum_type.name}: use one of {allowed}")


def _values(message: Message, field: FieldDescriptor, path: str) -> Iterator[tuple[str, Any]]:
    value = getattr(message, field.name)
    if field.is_repeated:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            yield from ((f"{path}[{key}]", item) for key, item in value.items())
        else:
            yield from ((f"{path}[{index}]", item) for index, item in enumerate(value))
    elif field.enum_type is not None or message.HasField(field.name):
        yield path, value


@cache
def _enum_fields(message: Descriptor) -> tuple[FieldDescriptor, ...]:
    """The fields of a message type that are enums, or messages that may contain enums."""
    return tuple(field for field in message.fields if field.enum_type is not None or _holds_enums(field.message_type))


def _holds_enums(message: Descriptor | None) -> bool:
    found, left = set(), [message]
    while left:
        kind = left.pop()
        if kind is None or kind.full_name in found:
            continue
        found.add(kind.full_name)
        if any(field.enum_type is not None for field in kind.fields):
            return True
        left += [field.message_type for field in kind.fields]
    return False
