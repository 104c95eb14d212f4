"""Checks the number of fields of a message before it is parsed.

An empty message takes two bytes. Parsing four MiB of them takes a tenth of a second and a hundred MiB of memory.
"""

from __future__ import annotations

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from host.errors import InvalidArgumentError
from proto.nri.v1alpha1 import nri_pb2
from runtime.nri.answers.size import MAX_ENTRIES, MAX_UPDATES

MAX_FIELDS = 1 << 16  # of one message, with the fields of all messages inside it
_MAX_NUMBER_LENGTH = 10  # bytes of a varint
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}
_UPDATES = (nri_pb2.ContainerUpdate.DESCRIPTOR, nri_pb2.ContainerEviction.DESCRIPTOR)
_NEVER_PACKED = (FieldDescriptor.CPPTYPE_STRING, FieldDescriptor.CPPTYPE_MESSAGE)


def check_wire(data: bytes, kind: Descriptor) -> None:
    """Raise InvalidArgumentError for a message of ``kind`` that has too many fields, or a list with too many entries.

    Bytes that are no message are not refused here. The parser refuses them, after as many fields at most.
    """
    _Walk(data).message(kind, 0, len(data))


class _Walk:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._fields = 0

    def message(self, kind: Descriptor, at: int, end: int) -> bool:
        """Check the fields of one message. False if the bytes are no message."""
        entries: dict[int, int] = {}
        known = kind.fields_by_number
        while at < end:
            tag, at = self._varint(at, end)
            if at < 0:
                return False
            self._fields += 1
            if self._fields > MAX_FIELDS:
                raise InvalidArgumentError(f"too many fields: the limit is {MAX_FIELDS}")
            number, form = tag >> 3, tag & 7
            begin = at
            if form == _VARINT:
                _, at = self._varint(at, end)
            elif form == _BYTES:
                length, begin = self._varint(at, end)
                at = begin + length if begin >= 0 else -1
            elif form in _FIXED:
                at += _FIXED[form]
            if not 0 <= at <= end:
                return False
            field = known.get(number)
            if field is None:
                continue
            if field.is_repeated:
                entries[number] = entries.get(number, 0) + 1
                _check_entries(field, entries[number], at - begin)
            inner = field.message_type if form == _BYTES else None
            if inner is not None and not self.message(inner, begin, at):
                return False
        return True

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """A number and the position behind it; the position is -1 if there is no number."""
        value = shift = 0
        for index in range(at, min(at + _MAX_NUMBER_LENGTH, end)):
            byte = self._data[index]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, index + 1
            shift += 7
        return 0, -1


def _check_entries(field: FieldDescriptor, count: int, size: int) -> None:
    if field.message_type in _UPDATES:
        if count > MAX_UPDATES:
            raise InvalidArgumentError(f"too many updates at once: the limit is {MAX_UPDATES}")
        return
    packed = field.cpp_type not in _NEVER_PACKED and size > MAX_ENTRIES * _MAX_NUMBER_LENGTH
    if count > MAX_ENTRIES or packed:
        raise InvalidArgumentError(f"too many entries of {field.name}: the limit is {MAX_ENTRIES}")
