"""Where a blob has its table of contents: by the annotations of its descriptor, or by the footer of a kept blob.

References: "zstd:chunked file format" of containers/storage; "eStargz" of containerd's stargz-snapshotter.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from images.chunked.records import (
    ASSEMBLED,
    ESTARGZ,
    FOOTER_BYTES,
    HEADER,
    INDEX_FOOTER,
    INDEX_MARK,
    LARGEST_PLAIN,
    LARGEST_TAIL,
    SKIPPABLE,
    ZSTD_CHUNKED,
)
from images.oci.digests import is_digest
from images.oci.manifests import Descriptor

_PREFIX = "io.github.containers.zstd-chunked."
_CHECKSUM, _POSITION = _PREFIX + "manifest-checksum", _PREFIX + "manifest-position"
_SPLIT_POSITION = _PREFIX + "tarsplit-position"
_NUMBERS = re.compile(r"[0-9]{1,15}(:[0-9]{1,15}){2,3}")
_CRFS = 1  # the only type of a table of contents

_STARGZ_DIGEST = "containerd.io/snapshot/stargz/toc.digest"
_STARGZ_FOOTER = re.compile(rb"\x1f\x8b\x08\x04.{6}\x1a\0SG\x16\0([0-9a-f]{16})STARGZ\x01\0\0\xff\xff\0{8}", re.DOTALL)
STARGZ_FOOTER_BYTES = 51

_ZSTD_FOOTER = 64
_ZSTD_MARK = b"GNUlInUx"


@dataclass(frozen=True, slots=True)
class TocPlace:
    """Format and size of a blob, and offset, size and unpacked size of its table of contents and its tar-split data.

    ``tail`` is the offset of the first byte that belongs to no file. ``digest`` is that of the table of contents, as it
    is in the blob (zstd:chunked) or decompressed (eStargz), and is empty if it is not known. Without tar-split data its
    three numbers are 0.
    """

    format: int
    size: int
    tail: int
    toc: tuple[int, int, int]
    split: tuple[int, int, int] = (0, 0, 0)
    digest: str = ""

    @property
    def valid(self) -> bool:
        """Whether all parts are inside of the blob and within the limits."""
        tail_size = self.size - self.tail
        return (
            0 < tail_size <= LARGEST_TAIL
            and self.tail > 0
            and all(
                self.tail <= offset and 0 < size <= self.size - offset and plain <= LARGEST_PLAIN
                for offset, size, plain in (self.toc, *((self.split,) if any(self.split) else ()))
            )
        )

    def header(self) -> bytes:
        """It as the planner reads it."""
        return HEADER.pack(self.format, self.size, self.tail, *self.toc, *self.split)


def announced(descriptor: Descriptor) -> TocPlace | None:
    """The place of the table of contents that the annotations of a layer name; None if they name none that is valid.

    See ``estargz_digest`` for the other format.
    """
    annotations = descriptor.annotations or {}
    toc = _numbers(annotations.get(_POSITION, ""), 4)
    digest = annotations.get(_CHECKSUM, "")
    if toc is None or toc[3] != _CRFS or not is_digest(digest):
        return None
    split = _numbers(annotations.get(_SPLIT_POSITION, ""), 3) or (0, 0, 0)
    tail = toc[0] - SKIPPABLE.size
    place = TocPlace(
        ZSTD_CHUNKED, descriptor.size, tail, (toc[0], toc[1], toc[2]), (split[0], split[1], split[2]), digest
    )
    return place if place.valid else None


def estargz_digest(descriptor: Descriptor) -> str:
    """The digest of the table of contents of a layer in the format eStargz; empty for other layers.

    The end of the blob says where it is: ``estargz_place``.
    """
    digest = (descriptor.annotations or {}).get(_STARGZ_DIGEST, "")
    return digest if is_digest(digest) and digest.startswith("sha256:") else ""


def estargz_place(end: bytes, size: int, digest: str = "") -> TocPlace | None:
    """The place of the table of contents in a blob of ``size`` bytes, of which ``end`` are the last."""
    footer = _STARGZ_FOOTER.fullmatch(end[-STARGZ_FOOTER_BYTES:])
    if footer is None:
        return None
    offset = int(footer[1], 16)
    place = TocPlace(ESTARGZ, size, offset, (offset, size - STARGZ_FOOTER_BYTES - offset, LARGEST_PLAIN), digest=digest)
    return place if place.valid else None


def _numbers(text: str, count: int) -> tuple[int, ...] | None:
    numbers = tuple(map(int, text.split(":"))) if _NUMBERS.fullmatch(text) else ()
    return numbers if len(numbers) == count else None


def kept_place(descriptor: int) -> TocPlace | None:
    """The place of the table of contents in the kept blob that is open as ``descriptor``; None if it has none."""
    size = os.fstat(descriptor).st_size
    end = os.pread(descriptor, _ZSTD_FOOTER, max(0, size - _ZSTD_FOOTER))
    if len(end) < _ZSTD_FOOTER:
        return None
    place = estargz_place(end, size)
    if end.endswith(_ZSTD_MARK):
        offset, packed, plain, kind, *split = (int.from_bytes(end[at : at + 8], "little") for at in range(0, 56, 8))
        if kind == _CRFS:
            toc = (offset, packed, plain)
            place = TocPlace(ZSTD_CHUNKED, size, offset - SKIPPABLE.size, toc, (split[0], split[1], split[2]))
    elif end.endswith(INDEX_MARK):
        offset, packed, plain, _ = INDEX_FOOTER.unpack(end[-INDEX_FOOTER.size :])
        if offset + packed + FOOTER_BYTES == size:
            place = TocPlace(ASSEMBLED, size, offset - SKIPPABLE.size, (offset, packed, plain))
    return place if place is not None and place.valid else None
