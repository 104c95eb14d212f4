"""Reading container logs in the CRI's form: ``TIME STREAM F|P TEXT``, where P marks a part that others complete."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Self

from host.errors import NotFoundError


@dataclass(frozen=True, slots=True)
class LogLine:
    """One whole line; ``time`` as written (RFC 3339), ``content`` with its line end unless it was cut at the exit."""

    time: str
    stream: str
    content: bytes

    @property
    def text(self) -> str:
        """The content for people, without the line end."""
        return self.content.decode(errors="replace").rstrip("\r\n")


class LogReader:
    """Reads a log from its beginning, across rotations, in a ``with`` block. Raises NotFoundError if there is none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unfinished = b""
        self._parts: dict[str, list[bytes]] = {}
        self._file = self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def lines(self) -> Iterator[LogLine]:
        """The whole lines written since the last call."""
        while True:
            for raw in self._file:
                self._unfinished += raw
                if not self._unfinished.endswith(b"\n"):
                    continue  # the writer has not finished it
                record, self._unfinished = self._unfinished[:-1], b""
                line = self._join(record)
                if line is not None:
                    yield line
            if not self._rotated():
                return
            self._file.close()
            self._file = self._open()

    def rest(self) -> Iterator[LogLine]:
        """The parts without a last part, once the container has ended and writes no more."""
        for stream, parts in self._parts.items():
            if parts:
                yield LogLine("", stream, b"".join(parts))
        self._parts = {}

    def _join(self, record: bytes) -> LogLine | None:
        time, stream, tag, content = (*record.split(b" ", 3), b"", b"", b"")[:4]
        parts = self._parts.setdefault(stream.decode(errors="replace"), [])
        parts.append(content)
        if tag.split(b":")[0] == b"P":
            return None
        whole = b"".join(parts) + b"\n"
        parts.clear()
        return LogLine(time.decode(errors="replace"), stream.decode(errors="replace"), whole)

    def _rotated(self) -> bool:
        with contextlib.suppress(FileNotFoundError):  # renamed, and the new one does not exist yet
            return not os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        return False

    def _open(self) -> BufferedReader:
        try:
            return self._path.open("rb")
        except FileNotFoundError as error:
            raise NotFoundError(f"log file {self._path} does not exist") from error


def tail_lines(path: Path, count: int) -> list[LogLine]:
    """The last ``count`` lines; none if there is no log."""
    try:
        with LogReader(path) as reader:
            return list(deque([*reader.lines(), *reader.rest()], maxlen=count))
    except NotFoundError:
        return []
