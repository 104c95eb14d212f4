"""Mounts layers with the ids of a user namespace, so that an overlay can be made of them.

Overlayfs itself cannot be mounted with mapped ids, but its layers can (Linux 5.19). Each layer is bind mounted with
mapped ids to its own folder while the overlay is made. The overlay keeps using these mounts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from host import libc
from host.files import mounts


@contextlib.contextmanager
def with_mapped_ids(folders: Sequence[Path], scratch: Path, user_namespace: Path | None) -> Iterator[list[Path]]:
    """Provide the ``folders`` with mapped ids, through mounts in ``scratch``; unchanged without a user namespace.

    Raises UnsupportedError if the file system has no idmapped mounts.
    """
    if user_namespace is None:
        yield list(folders)
        return
    clear(scratch)
    scratch.mkdir()
    try:
        # A separate tmpfs: one unmount removes all mounts, and they do not propagate to other mount namespaces.
        libc.mount("layers", str(scratch), "tmpfs", mounts.MS_NOSUID | mounts.MS_NODEV, "mode=700")
        libc.mount("", str(scratch), "", mounts.MS_PRIVATE, "")
        mapped = []
        for number, folder in enumerate(folders):
            target = scratch / str(number)
            target.mkdir()
            mounts.bind_with_ids(folder, target, user_namespace)
            mapped.append(target)
        yield mapped
    finally:
        clear(scratch)


def scratch_of(target: Path) -> Path:
    """The folder for mapped layers while an overlay is made at ``target``."""
    return target.with_name(target.name + ".mapped")


def clear(scratch: Path) -> None:
    """Unmount and remove everything in ``scratch``. Missing ones are no error."""
    mounts.unmount(scratch, lazy=True)
    with contextlib.suppress(FileNotFoundError):
        for target in scratch.iterdir():  # an older agent mounted each layer without a tmpfs
            mounts.unmount(target, lazy=True)
            target.rmdir()
        scratch.rmdir()
