"""Whether a zstd stream ends where one of its frames ends (RFC 8878): the decompressor does not say.

Runs in the unpack worker, so it imports next to nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as type checkers know it, without importing typing
if TYPE_CHECKING:
    from collections.abc import Generator

_FRAME = b"\x28\xb5\x2f\xfd"
_SKIPPABLE = range(0x184D2A50, 0x184D2A60)
_RLE = 1  # the kind of a block that is one byte, repeated


def is_zstd(start: bytes) -> bool:
    """Whether these first bytes are those of a zstd frame, or of one to be skipped."""
    return start[:4] == _FRAME or int.from_bytes(start[:4], "little") in _SKIPPABLE


class ZstdFrames:
    """Is shown a stream with ``feed``, from its start."""

    def __init__(self) -> None:
        self._between = True
        self._skip = 0  # bytes before the next field
        self._got = b""  # of the next field
        self._fields = self._follow()
        self._wanted = next(self._fields)

    @property
    def complete(self) -> bool:
        """Whether a frame has just ended. Also true of a stream that is broken, which the decompressor refuses."""
        return self._between and not self._skip and not self._got

    def feed(self, data: memoryview) -> None:
        """Look at the next bytes."""
        position, end = 0, len(data)
        while position < end and self._wanted:
            if self._skip:
                step = min(self._skip, end - position)
                self._skip -= step
            else:
                step = min(self._wanted - len(self._got), end - position)
                self._got += data[position : position + step]
                if len(self._got) == self._wanted:
                    field, self._got = self._got, b""
                    self._wanted = self._fields.send(field)
            position += step

    def _follow(self) -> Generator[int, bytes, None]:
        """Yields the sizes of the fields that matter; ``_skip`` is what comes before each of them."""
        while True:
            self._between = True
            magic = yield 4
            self._between = False
            if int.from_bytes(magic, "little") in _SKIPPABLE:
                self._skip = int.from_bytes((yield 4), "little")
                continue
            if magic != _FRAME:
                break
            (descriptor,) = yield 1
            single_segment = descriptor >> 5 & 1
            content_size = (single_segment, 2, 4, 8)[descriptor >> 6]
            self._skip = 1 - single_segment + (0, 1, 2, 4)[descriptor & 3] + content_size
            last = 0
            while not last:
                block = int.from_bytes((yield 3), "little")
                last, kind = block & 1, block >> 1 & 3
                self._skip = 1 if kind == _RLE else block >> 3
            if descriptor & 4:
                self._skip += 4  # a checksum
        self._between = True
        yield 0
