"""Comparing file trees and computing their digest, in a separate process (``images/unpack/tree_comparison.py``)."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from host import processes

_START = f"import sys; sys.path.append(sys.argv[1]); from {__package__}.tree_comparison import main; main(sys.argv[2:])"
_SOURCES = str(Path(__file__).parents[__name__.count(".")])


class Trees(msgspec.Struct):
    """``differences`` of the second tree from the first, or ``inodes`` and ``digest`` of the only one."""

    differences: list[str]
    inodes: int = 0
    digest: str = ""


async def look_at(*folders: Path) -> Trees:
    """The result for one tree or for two."""
    command = (sys.executable, "-I", "-S", "-c", _START, _SOURCES, *map(str, folders))
    done = await processes.run(command, environment={})
    return msgspec.json.decode(done.stdout, type=Trees)
