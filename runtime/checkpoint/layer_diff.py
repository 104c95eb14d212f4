"""The changes of a container to its image: the content of its writable layer, and the removed names. Blocks."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from host.errors import LimitError
from host.files.file_tree import open_below
from runtime.checkpoint.tar_writer import TarWriter

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPAQUE = "trusted.overlay.opaque"
_MAX_REMOVED = 1_000_000


def write_diff(upper: Path, lower: Sequence[Path], target: int, check: Callable[[], None]) -> list[str]:
    """Write the writable layer ``upper`` to the open file ``target`` as a tar file. Returns the removed paths.

    The tar file has added and changed files, without whiteouts. ``lower`` are the image's layers, the topmost first.
    ``check`` is called regularly and may raise. Raises OSError, and LimitError for more than a million removed names.
    """
    removed: list[str] = []

    def note(path: str) -> None:
        if len(removed) >= _MAX_REMOVED:
            raise LimitError(f"the container removed more than {_MAX_REMOVED} files of its image")
        removed.append(path)

    def leave_out(folder: int, name: str, place: str, status: os.stat_result) -> bool:
        if _is_whiteout(status):
            note(place)
            return True
        if stat.S_ISDIR(status.st_mode) and _is_opaque(folder, name):
            there = set(_names(folder, name))
            for hidden in sorted(_visible_names(lower, place) - there):
                note(f"{place}/{hidden}")
        return False

    with _opened(upper) as root:
        writer = TarWriter(target, check)
        writer.tree(root, leave_out)
        writer.end()
    return removed


def _is_whiteout(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def _is_opaque(folder: int, name: str) -> bool:
    descriptor = open_below(folder, name, _FOLDER)
    try:
        return os.getxattr(descriptor, _OPAQUE) == b"y"
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _names(folder: int, name: str) -> Iterator[str]:
    descriptor = open_below(folder, name, _FOLDER)
    try:
        for entry in os.scandir(descriptor):
            if not _is_whiteout(entry.stat(follow_symlinks=False)):
                yield entry.name
    finally:
        os.close(descriptor)


def _visible_names(lower: Sequence[Path], place: str) -> set[str]:
    """The names that all layers of the image have in the folder ``place``."""
    seen: set[str] = set()
    hidden: set[str] = set()
    for layer in lower:
        try:
            with _opened(layer) as root:
                descriptor, covers = _enter(root, place)
        except FileNotFoundError:
            continue
        if descriptor is None:
            if covers:
                break
            continue
        try:
            for entry in os.scandir(descriptor):
                if entry.name in seen or entry.name in hidden:
                    continue
                (hidden if _is_whiteout(entry.stat(follow_symlinks=False)) else seen).add(entry.name)
        finally:
            os.close(descriptor)
        if covers:
            break
    return seen


def _enter(root: int, place: str) -> tuple[int | None, bool]:
    """The folder ``place`` of a layer (None if it has none), and whether it hides the folders of lower layers."""
    current, covers = os.dup(root), False
    for name in place.split("/"):
        try:
            below = open_below(current, name, _FOLDER)
        except FileNotFoundError:
            os.close(current)
            return None, covers
        except OSError:  # a file, a link or a whiteout
            os.close(current)
            return None, True
        os.close(current)
        current = below
        with contextlib.suppress(OSError):
            covers |= os.getxattr(current, _OPAQUE) == b"y"
    return current, covers


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, _FOLDER)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
