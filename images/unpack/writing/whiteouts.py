"""Looks at the whiteouts of a layer that is being written.

Some tools write a whiteout of a folder and also of the files that it had, in any order.
"""

# Names are bytes, which pathlib does not take.
# ruff: noqa: PTH208
from __future__ import annotations

import os
import stat

from images.unpack.writing.layer_root import LayerRoot

TYPE_CHECKING = False  # type checkers treat this name as true; importing typing is slow
if TYPE_CHECKING:
    from collections.abc import Container

WHITED_OUT = stat.S_IFCHR  # whiteouts are the only device nodes that the worker makes


def is_hidden(root: LayerRoot, folder: bytes) -> bool:
    """Whether a whiteout hides ``folder``, which has no links in its path."""
    there = root.resolve(folder)[1]
    return bool(there) and root.kind(b"/".join(folder.split(b"/")[:there])) == WHITED_OUT


def has_only_whiteouts(root: LayerRoot, path: bytes, implied: Container[bytes], opaque: Container[bytes]) -> bool:
    """Whether ``path`` is a folder that exists only because of whiteouts in it.

    ``implied`` are the folders without an entry, ``opaque`` those that the layer says to be new.
    """
    pending = [path]
    while pending:
        folder = pending.pop()
        if folder not in implied or folder in opaque:
            return False
        for child in os.listdir(root.near(folder)):
            kind = root.kind(folder + b"/" + child)
            if kind == stat.S_IFDIR:
                pending.append(folder + b"/" + child)
            elif kind != WHITED_OUT:
                return False
    return True
