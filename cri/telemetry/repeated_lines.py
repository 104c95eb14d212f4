"""Limits repeated log lines: further lines about the same problem within a minute are counted and left out."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

_SECONDS = 60.0
_MAX_EQUAL = 3  # equal lines in that time; one with a traceback
_MAX_ALIKE = 300  # lines in that time that differ in what they name
_REMEMBERED = 1000


@dataclass(slots=True)
class _Seen:
    record: logging.LogRecord
    until: float
    count: int = 0
    left_out: int = 0


class _Minutes:
    """Counts lines by a key over minutes that begin with the first of them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._seen: dict[tuple[object, ...], _Seen] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def passes(self, key: tuple[object, ...], record: logging.LogRecord, now: float, most: int = 0) -> bool:
        """Count one more; whether it is one of the first ``most`` of its minute."""
        seen = self._seen.get(key)
        if seen is None:
            if len(self._seen) >= _REMEMBERED:
                del self._seen[next(iter(self._seen))]
            seen = self._seen[key] = _Seen(record, now + _SECONDS)
        seen.count += 1
        if seen.count <= (most or self._most):
            return True
        seen.left_out += 1
        return False

    def over(self, now: float) -> Iterator[_Seen]:
        """Remove the entries whose minute is over, and yield them."""
        while self._seen:
            key, seen = next(iter(self._seen.items()))
            if seen.until > now:
                return
            del self._seen[key]
            yield seen


class RepeatedLines(logging.Filter):
    """Leaves out warnings and errors that repeat themselves; once their minute is over, says how many.

    Equal lines pass three times a minute, with a traceback once; those that one place in the program writes about
    different objects 300 times. Lines below the level WARNING always pass.
    """

    def __init__(self, handler: logging.Handler) -> None:
        super().__init__()
        self._handler = handler
        self._equal = _Minutes(_MAX_EQUAL)
        self._alike = _Minutes(_MAX_ALIKE)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is written."""
        if record.levelno < logging.WARNING:
            return True
        now = time.monotonic()
        for counted in (self._equal, self._alike):
            for seen in counted.over(now):
                self._tell(seen)
        kind = record.exc_info[0] if record.exc_info else None
        equal = (record.name, record.levelno, record.getMessage(), kind)
        if not self._equal.passes(equal, record, now, 1 if kind is not None else 0):
            return False
        return self._alike.passes((record.name, record.levelno, str(record.msg)), record, now)

    @property
    def remembered(self) -> int:
        """The number of different lines that are counted now, or of places that write them, whichever is larger."""
        return max(len(self._equal), len(self._alike))

    def _tell(self, seen: _Seen) -> None:
        if seen.left_out:
            text = f"{seen.left_out} more lines like this in {_SECONDS:g} s: {seen.record.getMessage()}"
            self._handler.emit(logging.LogRecord(seen.record.name, seen.record.levelno, "", 0, text, (), None))
