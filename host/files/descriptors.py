"""The number of file descriptors that this process may still open, and the calls that are refused when few are left.

Stopping and listing are never refused. Creating pods and containers leaves a reserve for them. Image pulls and streams,
of which clients may begin any number, leave twice as much, so that pods can still be created.
"""

from __future__ import annotations

import resource
from enum import Enum
from pathlib import Path

from host.errors import LimitError

_MAX_RESERVE = 256  # descriptors in reserve
FOLDER = Path("/proc/self/fd")


class Use(Enum):
    """The purpose of a descriptor, with the number of reserves that it must leave free."""

    MAKING = 1
    STREAMS_AND_IMAGES = 2


def raise_limit() -> None:
    """Raise the soft limit of descriptors to the hard limit: the usual 1024 are enough for some hundred containers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def limit() -> int:
    """The limit of descriptors."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def left() -> int:
    """How many descriptors can still be opened."""
    try:
        opened = FOLDER.stat().st_size or _count()  # the size is their number from Linux 6.2 on
    except OSError:  # no descriptor is free to list the open ones
        return 0
    return max(0, limit() - opened)


def _count() -> int:
    """The number of open descriptors. If many are left, the size of the kernel's table, which is not smaller."""
    with open("/proc/self/status", "rb") as status:
        table = next((int(line.split()[1]) for line in status if line.startswith(b"FDSize:")), 0)
    if table and limit() - table >= max(Use, key=lambda use: use.value).value * _reserve():
        return table
    return len(tuple(FOLDER.iterdir()))


def _reserve() -> int:
    return min(_MAX_RESERVE, limit() // 8)


def scarce(use: Use = Use.STREAMS_AND_IMAGES) -> bool:
    """Whether too few descriptors are left for ``use``."""
    return left() < use.value * _reserve()


def require(what: str, use: Use = Use.STREAMS_AND_IMAGES) -> None:
    """Raise LimitError if too few descriptors are left for ``use``. ``what`` names the refused call."""
    if scarce(use):
        raise LimitError(
            f"{what} is refused: {left()} of the agent's {limit()} file descriptors are left, and they are kept for "
            "stopping containers. End streams and commands, or raise the limit (LimitNOFILE= of the systemd unit)"
        )
