"""Requests of events as bytes, so that a pod or container is encoded once and not for each event and plugin."""

from __future__ import annotations

_BYTES = 2  # the wire type of messages, text and bytes


def number(value: int) -> bytes:
    """A number of protobuf, which is not negative."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def field(tag: int, content: bytes) -> bytes:
    """A field of a message that holds a message, text or bytes."""
    return number(tag << 3 | _BYTES) + number(len(content)) + content


class EventRequest:
    """The request of an event: its pod, and its container unless it is an event of a pod, both encoded.

    ``encoded`` is the request for the event's own method: all of them have the pod as field 1 and the container as
    field 2. ``rest`` has its other fields, encoded.
    """

    __slots__ = ("_container", "_pod", "encoded")

    def __init__(self, pod: bytes, container: bytes | None = None, rest: bytes = b"") -> None:
        self._pod = pod
        self._container = container
        self.encoded = field(1, pod) + (field(2, container) if container is not None else b"") + rest

    def state_change(self, event: int) -> bytes:
        """The request of StateChange for an event."""
        container = field(3, self._container) if self._container is not None else b""
        return b"\x08" + number(event) + field(2, self._pod) + container
