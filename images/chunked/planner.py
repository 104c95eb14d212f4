"""The planner: a short-lived process that decides which bytes of a layer are fetched and which are kept ones.

It is confined as the unpack worker, reads standard input (``images/chunked/records.py``), and writes a plan: records
whose bytes, one after the other, are a blob of the layer. This blob is the original one if what is between the files is
kept as well, or costs little to fetch. Otherwise the planner makes it from the tar-split data, and the blob is another
one with the same content.
"""

from __future__ import annotations

from images.chunked.records import (
    DIGEST_BYTES,
    ESTARGZ,
    FETCHED,
    FOOTER_BYTES,
    HEADER,
    INDEX_ENTRY,
    INDEX_FOOTER,
    INDEX_MARK,
    KEPT,
    LARGEST_PLAIN,
    LARGEST_TAIL,
    MADE,
    MADE_FILE,
    MARK,
    MOST_RANGES,
    PLAN_FILE,
    RECORD,
    SKIPPABLE,
    SKIPPABLE_MAGIC,
    TAIL,
)
from images.chunked.toc import Place, Segments, segments_of
from images.unpack.tar.headers import LimitError, TarError
from images.unpack.worker import main as run_worker
from images.unpack.worker import zstd_module

TYPE_CHECKING = False  # type checkers treat this name as true; importing typing is slow
if TYPE_CHECKING:
    import io
    from collections.abc import Callable
    from typing import Any

_ENOUGH = 0.97  # of the bytes: then no more kept blobs are read
_NEEDED = 1.2  # the original blob is preferred if it needs at most so much more, and
_NEEDED_BYTES = 128 << 10
_NEEDED_RANGES = 4
_WASTED = 0.03  # of the blob: kept bytes that are fetched too, to have fewer ranges
# A blob in eStargz is made of as many parts as the processors that made it, and these end anywhere.
_STARGZ_UNEQUAL = 0.25
_LEVEL = 3
_GAPS_FILE = "gaps"


class Kept:
    """Where the segments of the wanted blob are in kept blobs: (number of the blob, offset, size), or None."""

    def __init__(self, wanted: Segments) -> None:
        self._wanted = wanted
        count = len(wanted.keys)
        self.exact: list[tuple[int, int, int] | None] = [None] * count
        self.content: list[tuple[int, int, int] | None] = [None] * count
        self._by_key: dict[bytes, list[int]] = {}
        for number, key in enumerate(wanted.keys):
            self._by_key.setdefault(key, []).append(number)
        self._missing = sum(wanted.ends[-1:])
        self._all = self._missing

    @property
    def enough(self) -> bool:
        """Whether more kept blobs can bring little."""
        return self._missing <= (1 - _ENOUGH) * self._all

    def look_into(self, blob: int, kept: Segments, most_unequal: float) -> None:
        """Take what is equal in a kept blob.

        A compressor makes the same bytes of the same content. If more than the part ``most_unequal`` of the pairs
        differ in size, another compressor made the kept blob: then its chunks have the content, but none counts as
        equal.
        """
        unequal = 0
        found = []
        for key, begin, end in zip(kept.keys, kept.begins, kept.ends, strict=True):
            for number in self._by_key.get(key, ()):
                found.append((number, (blob, begin, end - begin)))
                if self._size(number) != end - begin:
                    unequal += 1
        same_compressor = unequal <= most_unequal * len(found)
        for number, place in found:
            if self.content[number] is None and self.exact[number] is None:
                self._missing -= self._size(number)
            if self._wanted.is_chunk[number] and self.content[number] is None:
                self.content[number] = place
            if same_compressor and self.exact[number] is None and self._size(number) == place[2]:
                self.exact[number] = place

    def _size(self, number: int) -> int:
        return self._wanted.ends[number] - self._wanted.begins[number]


class Ranges:
    """The parts of a blob to fetch. ``fetched`` says of each segment whether it is in one."""

    def __init__(self, wanted: Segments, fetched: list[bool]) -> None:
        self.fetched = fetched
        runs: list[list[int]] = []
        for number, needed in enumerate(fetched):
            if needed and runs and runs[-1][1] == number - 1:
                runs[-1][1] = number
            elif needed:
                runs.append([number, number])
        # The smallest spaces between two ranges are fetched too.
        budget = int(wanted.ends[-1] * _WASTED) if wanted.ends else 0
        spaces = [
            (wanted.begins[after[0]] - wanted.ends[before[1]], before[1], after[0])
            for before, after in zip(runs, runs[1:], strict=False)  # noqa: RUF007 - itertools is not needed otherwise
        ]
        merged = 0
        for space, last, first in sorted(spaces):
            budget -= space
            if budget < 0:
                break
            merged += 1
            for number in range(last + 1, first):
                fetched[number] = True
        self.count = len(runs) - merged
        self.size = sum(
            end - begin for begin, end, needed in zip(wanted.begins, wanted.ends, fetched, strict=True) if needed
        )


class PlanWriter:
    """Writes the records of a plan. Adjacent ones become one."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file = file
        self._last = [FETCHED, 0, 0, 0]
        self.size = 0
        self.kept = 0

    def add(self, kind: int, blob: int, offset: int, size: int) -> None:
        """Add the next bytes."""
        last = self._last
        self.size += size
        if kind == KEPT:
            self.kept += size
        if last[0] == kind and last[1] == blob and last[2] + last[3] == offset:
            last[3] += size
            return
        self.end()
        self._last = [kind, blob, offset, size]

    def end(self) -> None:
        """Write the last record."""
        if self._last[3]:
            self._file.write(RECORD.pack(*self._last))


def plan(read: Callable[[int], bytes], max_entries: int, zstd: Any) -> dict[str, object]:
    """Write a plan for the blobs of standard input into the working folder. Returns a summary of it."""
    source = _Reader(read)
    if source.exactly(len(MARK)) != MARK:
        raise TarError("the planner's input is not valid")
    unpack = _unpacker(zstd)
    digest = source.exactly(DIGEST_BYTES)
    place, wanted_tail = source.blob()
    gaps = open(_GAPS_FILE, "x+b")  # noqa: SIM115 - the process ends when the plan is made
    wanted = segments_of(place, wanted_tail, unpack, gaps, digest)
    if len(wanted.keys) > 2 * max_entries:
        raise LimitError("its table of contents has more entries than images.max_layer_entries")
    kept = Kept(wanted)
    blob = 0
    while not kept.enough and (found := source.next_blob()) is not None:
        try:
            segments = segments_of(*found, unpack, _Nowhere())
        except Exception:  # a kept blob never makes the pull fail
            segments = Segments()  # a kept blob that cannot be used
        kept.look_into(blob, segments, _STARGZ_UNEQUAL if place.format == ESTARGZ else 0.0)
        blob += 1
    exact = Ranges(wanted, [one is None for one in kept.exact])
    chosen, is_exact = exact, True
    if wanted.gaps:
        loose = Ranges(wanted, _needed(wanted, kept))
        if exact.count > loose.count * _NEEDED + _NEEDED_RANGES or exact.size > loose.size * _NEEDED + _NEEDED_BYTES:
            chosen, is_exact = loose, False
    with open(PLAN_FILE, "xb") as plan_file, open(MADE_FILE, "xb") as made_file:
        writer = PlanWriter(plan_file)
        if is_exact:
            _write_exact(writer, wanted, kept, chosen)
            writer.add(TAIL, 0, 0, place.size - place.tail)
        else:
            _write_same_content(writer, wanted, kept, chosen, _Maker(made_file, gaps, zstd))
        writer.end()
    if chosen.count > MOST_RANGES:
        raise LimitError(f"it needs {chosen.count} ranges")
    return {"exact": is_exact, "fetched": chosen.size, "ranges": chosen.count, "kept": writer.kept, "size": writer.size}


def _needed(wanted: Segments, kept: Kept) -> list[bool]:
    """What to fetch if the planner makes what is between the files: missing files, and what is between two of them."""
    needed = [is_chunk and kept.content[number] is None for number, is_chunk in enumerate(wanted.is_chunk)]
    for number in range(1, len(needed) - 1):
        if not wanted.is_chunk[number] and needed[number - 1] and needed[number + 1]:
            needed[number] = True
    return needed


def _write_exact(writer: PlanWriter, wanted: Segments, kept: Kept, ranges: Ranges) -> None:
    for number, fetched in enumerate(ranges.fetched):
        place = kept.exact[number]
        if fetched or place is None:
            writer.add(FETCHED, 0, wanted.begins[number], wanted.ends[number] - wanted.begins[number])
        else:
            writer.add(KEPT, *place)


def _write_same_content(writer: PlanWriter, wanted: Segments, kept: Kept, ranges: Ranges, maker: _Maker) -> None:
    index = []
    for number, fetched in enumerate(ranges.fetched):
        begin = writer.size
        place = kept.content[number]
        if fetched:
            writer.add(FETCHED, 0, wanted.begins[number], wanted.ends[number] - wanted.begins[number])
        elif place is not None:
            writer.add(KEPT, *place)
        else:
            writer.add(MADE, 0, *maker.between(*wanted.gaps[number]))
        if wanted.is_chunk[number]:
            key = wanted.keys[number]
            index.append(INDEX_ENTRY.pack(key[1:33], int(key[33:]), begin, writer.size - begin))
    writer.add(MADE, 0, *maker.index(b"".join(index), writer.size))


class _Maker:
    """Compresses what no blob has."""

    def __init__(self, file: io.BufferedIOBase, gaps: io.BufferedIOBase, zstd: Any) -> None:
        self._file = file
        self._gaps = gaps
        self._compress = zstd.ZstdCompressor(_LEVEL).compress
        self._size = 0

    def between(self, offset: int, size: int) -> tuple[int, int]:
        """Offset and size in the file of a frame with this part of ``gaps``."""
        self._gaps.seek(offset)
        return self._add(self._compress(self._gaps.read(size)))

    def index(self, plain: bytes, begin: int) -> tuple[int, int]:
        """The frames at the end of the blob, from ``begin`` on in it: where the chunks are."""
        packed = self._compress(plain)
        footer = INDEX_FOOTER.pack(begin + SKIPPABLE.size, len(packed), len(plain), INDEX_MARK)
        frames = (SKIPPABLE.pack(SKIPPABLE_MAGIC, len(packed)), packed, SKIPPABLE.pack(SKIPPABLE_MAGIC, len(footer)))
        assert SKIPPABLE.size + len(footer) == FOOTER_BYTES
        return self._add(b"".join((*frames, footer)))

    def _add(self, data: bytes) -> tuple[int, int]:
        self._file.write(data)
        self._size += len(data)
        return self._size - len(data), len(data)


class _Reader:
    """Reads the input."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read

    def exactly(self, size: int) -> bytes:
        pieces = []
        while size:
            piece = self._read(size)
            if not piece:
                raise TarError("the planner's input is cut off")
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)

    def blob(self) -> tuple[Place, bytes]:
        """A blob's header and tail."""
        return self._rest(self.exactly(HEADER.size))

    def next_blob(self) -> tuple[Place, bytes] | None:
        """As ``blob``; None at the end."""
        first = self._read(1)
        return self._rest(first + self.exactly(HEADER.size - 1)) if first else None

    def _rest(self, header: bytes) -> tuple[Place, bytes]:
        place = Place(header)
        size = place.size - place.tail
        if not 0 < size <= LARGEST_TAIL:
            raise LimitError(f"its table of contents has more than {LARGEST_TAIL} bytes")
        return place, self.exactly(size)


class _Nowhere:
    """A file that is not kept."""

    def __init__(self) -> None:
        self._size = 0

    def write(self, data: bytes) -> None:
        self._size += len(data)

    def tell(self) -> int:
        return self._size


def _unpacker(zstd: Any) -> Callable[[bytes, int], bytes]:
    def unpack(data: bytes, size: int) -> bytes:
        if size > LARGEST_PLAIN:
            raise LimitError(f"its table of contents has more than {LARGEST_PLAIN} bytes")
        try:
            machine = zstd.ZstdDecompressor(max_window_size=LARGEST_PLAIN).decompressobj()
            pieces = []
            left = size
            for begin in range(0, len(data), 4096):
                pieces.append(machine.decompress(data[begin : begin + 4096]))
                left -= len(pieces[-1])
                if left < 0:
                    raise LimitError("its table of contents is larger than it should be")
            return b"".join(pieces)
        except Exception as error:
            if isinstance(error, LimitError):
                raise
            raise TarError(f"its table of contents is damaged: {error}") from error

    return unpack


def main() -> None:
    """Run the planner as ``images.unpack.worker.main`` runs the unpack worker."""
    zstd = zstd_module()
    run_worker(lambda read, max_bytes, max_entries: plan(read, max_entries, zstd))
