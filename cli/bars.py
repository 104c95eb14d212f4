"""Bars out of block characters, for terminals."""

from __future__ import annotations

_EIGHTHS = " ▏▎▍▌▋▊▉█"


def bar(begin: float, end: float, width: int, *, least: int = 0) -> str:
    """A bar from ``begin`` to ``end`` of 1, in ``width`` columns; its end falls on an eighth of a column.

    It has ``least`` eighths in any case.
    """
    first = min(int(begin * width), width - 1)
    eighths = max(least, round((min(end, 1.0) * width - first) * 8))
    full, part = divmod(eighths, 8)
    return (" " * first + "█" * full + (_EIGHTHS[part] if part else ""))[:width].ljust(width)
