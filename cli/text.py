"""Text that commands print: tables, ages, sizes, bars."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as their widest cell, two blanks apart."""
    cells = [list(headers), *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join(lines)


def number(count: int, noun: str) -> str:
    """``1 image``, ``2 images``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def size(count: float) -> str:
    """Bytes in the largest unit that leaves at least 1, with three digits or all before the point: ``4.21 MiB``."""
    for unit in _UNITS:
        if abs(count) < 1024 or unit == _UNITS[-1]:
            return f"{count:.0f} {unit}" if unit == "B" or abs(count) >= 999.5 else f"{count:.3g} {unit}"
        count /= 1024
    raise AssertionError("unreachable: the last unit takes every number")


def duration(seconds: float) -> str:
    """A length of time in its largest unit: ``9.3 ms``, ``42 s``, ``5 h``."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.3g} ms"
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:.0f} d"


def age(nanoseconds: int) -> str:
    """How long ago a time since the epoch was."""
    return "-" if nanoseconds <= 0 else duration(max(1.0, time.time() - nanoseconds / 1e9))


def short(identifier: str) -> str:
    """An id as tables show it."""
    return identifier.removeprefix("sha256:")[:13]


def bar(begin: float, end: float, width: int, *, least: int = 0) -> str:
    """A bar from ``begin`` to ``end`` of 1, in ``width`` columns; its end falls on an eighth of a column.

    It has ``least`` eighths in any case.
    """
    first = min(int(begin * width), width - 1)
    eighths = max(least, round((min(end, 1.0) * width - first) * 8))
    full, part = divmod(eighths, 8)
    return (" " * first + "█" * full + (_EIGHTHS[part] if part else ""))[:width].ljust(width)


def note(message: str) -> None:
    """Print a message for the user on standard error."""
    print(f"podkeel: {message}", file=sys.stderr)
