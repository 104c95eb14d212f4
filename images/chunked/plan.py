"""Has a plan made by the planner, checks it, and reads what it takes from this node.

The planner reads what the registry sent, so its plan is not trusted: every record is checked before it is used.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from host import processes
from host.errors import InvalidArgumentError, PodkeelError
from images.chunked.places import TocPlace
from images.chunked.records import (
    DIGEST_BYTES,
    ESTARGZ,
    FETCHED,
    KEPT,
    MADE,
    MADE_FILE,
    MARK,
    MOST_RANGES,
    PLAN_FILE,
    RECORD,
    TAIL,
)
from images.unpack.unpacker import module_paths
from images.unpack.worker_syscalls import worker_filter

_START = f"import sys; sys.path += sys.argv[1:3]; from {__package__}.planner import main; main()"
_SECONDS = 60
_LARGEST_FILE = 1 << 30
_BATCH = 1 << 20
_RECORDS_AT_ONCE = 4096
_EXTRA = 64 << 20  # bytes that a blob may have beyond twice the original's


class Summary(msgspec.Struct):
    """The planner's report. ``exact``: the plan gives the original blob. All numbers except ``ranges`` are bytes."""

    error: str = ""
    message: str = ""
    exact: bool = False
    fetched: int = 0
    ranges: int = 0
    kept: int = 0
    size: int = 0


class KeptBlob:
    """An open blob of this node with the place of its table of contents."""

    def __init__(self, descriptor: int, place: TocPlace) -> None:
        self.descriptor = descriptor
        self.place = place


def write_input(path: Path, wanted: TocPlace, tail: Sequence[bytes], kept: Sequence[KeptBlob]) -> None:
    """Write the planner's input to ``path``; blocks."""
    with path.open("xb") as file:
        file.write(MARK)
        file.write(bytes.fromhex(wanted.digest[7:]) if wanted.format == ESTARGZ else bytes(DIGEST_BYTES))
        file.write(wanted.header())
        for piece in tail:
            file.write(piece)
        for blob in kept:
            file.write(blob.place.header())
            position = blob.place.tail
            while piece := os.pread(blob.descriptor, _BATCH, position):
                file.write(piece)
                position += len(piece)


async def make_plan(folder: Path, path: Path, subject: str, most_entries: int) -> Summary:
    """Run the planner with the input at ``path``; it writes into ``folder``. Raises PodkeelError."""
    arguments = (*module_paths(), "1", str(folder), str(_LARGEST_FILE), str(most_entries), str(_SECONDS))
    source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        done = await processes.run(
            (sys.executable, "-I", "-S", "-c", _START, *arguments, worker_filter().hex()),
            descriptors={0: source},
            environment={},
            check=False,
            timeout=2 * _SECONDS,
        )
    finally:
        os.close(source)
    try:
        summary = msgspec.json.decode(done.stdout, type=Summary)
        message = bytes.fromhex(summary.message).decode()
    except (ValueError, RecursionError):
        output = done.stderr.decode(errors="replace").strip()[-500:]
        raise PodkeelError(f"{subject}: its planner ended with status {done.status}: {output or 'no report'}") from None
    if summary.error:
        raise InvalidArgumentError(f"{subject}: {message}")
    return summary


class Plan:
    """An open plan. ``close`` closes its files, not those of ``kept``."""

    def __init__(self, folder: Path, input_path: Path, wanted: TocPlace, kept: Sequence[KeptBlob], size: int) -> None:
        self._wanted = wanted
        self._kept = kept
        self._size = size
        self._tail_begin = len(MARK) + DIGEST_BYTES + len(wanted.header())
        self._descriptors: list[int] = []
        self._records = self._open(folder / PLAN_FILE)
        self._made = self._open(folder / MADE_FILE)
        self._input = self._open(input_path)
        self._position = 0
        self._pending: list[tuple[int, int, int, int]] = []
        self._rest = 0  # bytes of the record at hand that are already taken

    def _open(self, path: Path) -> int:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        self._descriptors.append(descriptor)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InvalidArgumentError(f"{path.name} of the planner is no file")
        return descriptor

    def close(self) -> None:
        """Close the files of the plan."""
        for descriptor in self._descriptors:
            os.close(descriptor)

    def checked_ranges(self) -> list[tuple[int, int]]:
        """The ranges to fetch, in order. Raises InvalidArgumentError if any record is impossible; blocks."""
        wanted = self._wanted
        sizes = {TAIL: wanted.size - wanted.tail, MADE: os.fstat(self._made).st_size}
        ranges: list[tuple[int, int]] = []
        total = fetched = 0
        while (record := self._next()) is not None:
            kind, blob, offset, size = record
            total += size
            if kind == FETCHED:
                good = fetched <= offset and offset + size <= wanted.tail and len(ranges) < MOST_RANGES
                fetched = offset + size
                ranges.append((offset, fetched))
            elif kind == KEPT:
                good = blob < len(self._kept) and offset + size <= self._kept[blob].place.size
            else:
                good = kind in sizes and offset + size <= sizes[kind]
            if not good or not size or total > 2 * wanted.size + _EXTRA:
                raise InvalidArgumentError(f"the plan has an impossible record: {kind} {blob} {offset} {size}")
        if total != self._size:
            raise InvalidArgumentError(f"the plan has {total} bytes, and should have {self._size}")
        self._position = 0
        return ranges

    def local(self) -> tuple[bytes, int]:
        """Bytes of this node, and how many must be taken from the registry then: blocks.

        Both are empty at the end. Call it after ``checked_ranges``.
        """
        pieces: list[bytes] = []
        collected = 0
        while collected < _BATCH and (record := self._next()) is not None:
            kind, blob, offset, size = record
            if kind == FETCHED:
                return b"".join(pieces), size
            source = self._kept[blob].descriptor if kind == KEPT else self._made
            if kind == TAIL:
                source, offset = self._input, offset + self._tail_begin
            now = min(size - self._rest, _BATCH)
            piece = os.pread(source, now, offset + self._rest)
            if len(piece) != now:
                raise InvalidArgumentError("a kept blob is shorter than it was")
            if self._rest + now < size:
                self._pending.append(record)
                self._rest += now
            else:
                self._rest = 0
            pieces.append(piece)
            collected += now
        return b"".join(pieces), 0

    def _next(self) -> tuple[int, int, int, int] | None:
        if not self._pending:
            data = os.pread(self._records, RECORD.size * _RECORDS_AT_ONCE, self._position)
            self._position += len(data)
            if len(data) % RECORD.size:
                raise InvalidArgumentError("the plan is cut off")
            self._pending = list(RECORD.iter_unpack(data))[::-1]
        return self._pending.pop() if self._pending else None
