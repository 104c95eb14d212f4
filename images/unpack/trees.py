"""Compares file trees or computes their digest, in a separate process (``images/unpack/tree_comparison.py``)."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from host import processes

_START = f"import sys; sys.path.append(sys.argv[1]); from {__package__}.tree_comparison import main; main(sys.argv[2:])"
_SOURCES = str(Path(__file__).parents[__name__.count(".")])


class Trees(msgspec.Struct):
    """``differences`` of the second tree from the first; or ``inodes`` and ``digest`` if there is only one tree."""

    differences: list[str]
    inodes: int = 0
    digest: str = ""


async def inspect_trees(*folders: Path) -> Trees:
    """Summarise one tree or compare two."""
    command = (sys.executable, "-I", "-S", "-c", _START, _SOURCES, *map(str, folders))
    done = await processes.run(command, environment={})
    return msgspec.json.decode(done.stdout, type=Trees)
