"""Random CRI messages similar to kubelet's, built from the protocol's descriptors."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

Choice = Callable[[random.Random], Any]

TEXTS = (
    "", "a", "ö", "🚀", "a:b", "a\nb", "a b", "../x", "/", "/x", "a\0b", "x" * 300, "-1", "%s%n", "=", "a=b", "\x1b[0m",
    "\u202e", "99999999999999999999", "1.5", "null", "{}", "[", "é" * 100, ".", "..", "sha256:" + "0" * 64,
)  # fmt: skip
NUMBERS = (0, 0, 1, 1, -1, 2, 7, 80, 1000, 1024, 65535, 65536, 10**6, 10**9)
_BOUNDS = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
}
_DEPTH = 5


class Messages:
    """Changes messages at random. ``pools`` has values for fields, by field name or by message and field name."""

    def __init__(self, generator: random.Random, pools: dict[str, Sequence[Any] | Choice]) -> None:
        self._random = generator
        self._pools = pools

    def change(self, message: Message, times: int) -> None:
        """Set ``times`` random fields, anywhere in the message."""
        for _ in range(times):
            self._change_one(message, _DEPTH)

    def _change_one(self, message: Message, depth: int) -> None:
        fields: list[Any] = list(message.DESCRIPTOR.fields)
        if not fields:
            return
        field = self._random.choice(fields)
        if field.message_type is None or field.message_type.GetOptions().map_entry or depth == 0:
            self._set(message, field)
            return
        inner: Any
        if field.is_repeated:
            items = getattr(message, field.name)
            inner = self._random.choice(items) if items and self._random.random() < 0.5 else items.add()
        else:
            inner = getattr(message, field.name)
            inner.SetInParent()
        self._change_one(inner, depth - 1)
        if self._random.random() < 0.5:
            self._change_one(inner, depth - 1)

    def _set(self, message: Message, field: FieldDescriptor) -> None:
        if self._random.random() < 0.1:
            message.ClearField(field.name)
        elif field.message_type is not None and field.message_type.GetOptions().map_entry:
            key, value = field.message_type.fields
            if value.message_type is None:
                entries = getattr(message, field.name)
                entries[self._value(message, key, field.name)] = self._value(message, value, field.name + ".value")
        elif field.message_type is not None:
            return
        elif field.is_repeated:
            for _ in range(self._random.choice((1, 1, 2, 20))):
                getattr(message, field.name).append(self._value(message, field, field.name))
        else:
            setattr(message, field.name, self._value(message, field, field.name))

    def _value(self, message: Message, field: FieldDescriptor, name: str) -> Any:
        pool = self._pools.get(f"{message.DESCRIPTOR.name}.{name}", self._pools.get(name))
        if pool is not None:
            value = pool(self._random) if callable(pool) else self._random.choice(pool)
            if isinstance(value, str) == (
                field.type == FieldDescriptor.TYPE_STRING
            ):  # fields of other types may have the same name
                return value
        if field.enum_type is not None:
            return self._random.choice([value.number for value in field.enum_type.values] + [999])
        low, high = _BOUNDS.get(field.type, (0, 0))
        values: dict[int, Sequence[Any]] = {
            FieldDescriptor.TYPE_STRING: TEXTS,
            FieldDescriptor.TYPE_BYTES: (b"", b"\0", b"\xff\xfe"),
            FieldDescriptor.TYPE_BOOL: (False, True),
            FieldDescriptor.TYPE_DOUBLE: (0.0, -1.0, 1e300, float("inf"), float("nan")),
        }
        numbers = [number for number in (*NUMBERS, low, high) if low <= number <= high]
        return self._random.choice(values.get(field.type, numbers))
