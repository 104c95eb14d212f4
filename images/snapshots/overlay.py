"""Mounts overlays of up to the kernel's maximum number of layers.

mount(2) accepts one page of options, which the absolute paths of 40 to 110 layers fill. Overlays of more layers are
mounted from a folder of short names (links to the layers). 500 of them, the kernel's maximum, need half a page at most.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from host import libc
from host.concurrency.thread_starting import run_in_new_thread
from host.errors import LimitError
from host.files.removal import remove_tree
from images.oci.layer_limit import MAX_LAYERS

_MOUNT_DATA = os.sysconf("SC_PAGE_SIZE") - 1


def mount_overlay(
    target: Path, lower: Sequence[Path], writable: tuple[Path, Path] | None, options: str, flags: int = 0
) -> None:
    """Mount the folders ``lower``, the topmost first, at ``target``; blocks.

    ``writable`` are the upper folder and its work folder, None for a read-only overlay. ``options`` are further mount
    options, each preceded by a comma. Raises LimitError for more layers than the kernel supports, OSError.
    """
    if len(lower) > MAX_LAYERS:
        raise LimitError(f"an overlay of {len(lower)} layers is over the kernel's limit of {MAX_LAYERS}")
    whole = _options([_escaped(path) for path in lower], [_escaped(path) for path in writable or ()]) + options
    if len(os.fsencode(whole)) <= _MOUNT_DATA:
        libc.mount("overlay", str(target), "overlay", flags, whole)
        return
    with _short_names([*lower, *(writable or ())], names_of(target)) as names:
        short = _options(names[: len(lower)], names[len(lower) :]) + options
        _mount_from(names_of(target), target, flags, short)


def names_of(target: Path) -> Path:
    """The folder for short names while an overlay is mounted at ``target``."""
    return target.with_name(target.name + ".names")


def _options(lower: Sequence[str], writable: Sequence[str]) -> str:
    options = "lowerdir=" + ":".join(lower)
    if writable:
        options += f",upperdir={writable[0]},workdir={writable[1]}"
    return options


def _escaped(path: Path) -> str:
    """A path in overlayfs's options: colons and commas are escaped with a backslash."""
    return str(path).replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")


@contextlib.contextmanager
def _short_names(paths: Sequence[Path], folder: Path) -> Iterator[list[str]]:
    """Make links to ``paths`` in the new ``folder``, and provide their names."""
    remove_tree(folder)  # an agent that was killed may have left it
    folder.mkdir(mode=0o700)
    try:
        for number, path in enumerate(paths):
            (folder / str(number)).symlink_to(path)
        yield [str(number) for number in range(len(paths))]
    finally:
        remove_tree(folder)


def _mount_from(folder: Path, target: Path, flags: int, options: str) -> None:
    """Mount with options whose relative paths are in ``folder``.

    A separate thread changes its working folder, which it does not share with the other threads (CLONE_FS).
    """

    def mount() -> None:
        libc.unshare(libc.CLONE_FS)
        os.chdir(folder)
        libc.mount("overlay", str(target), "overlay", flags, options)

    run_in_new_thread(mount, name="overlay")
