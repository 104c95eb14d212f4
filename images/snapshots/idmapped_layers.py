"""Layers seen with the ids of a user namespace while an overlay is made of them.

Overlayfs itself cannot be mounted with mapped ids, but its layers can (Linux 5.19). Each layer is bound with mapped ids
to its own folder while the overlay is made; the overlay keeps using these mounts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from host import libc
from host.files import mounts


@contextlib.contextmanager
def with_mapped_ids(folders: Sequence[Path], scratch: Path, user_namespace: Path | None) -> Iterator[list[Path]]:
    """The ``folders`` again, through mounts in ``scratch`` that map ids; themselves without a user namespace.

    Raises UnsupportedError where the file system has no idmapped mounts.
    """
    if user_namespace is None:
        yield list(folders)
        return
    clear(scratch)
    scratch.mkdir()
    try:
        # On a separate file system one unmount removes them all, and they do not propagate to other mount namespaces.
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
    """Where layers are mapped while an overlay is made at ``target``."""
    return target.with_name(target.name + ".mapped")


def clear(scratch: Path) -> None:
    """Unmount and remove what is in ``scratch``; missing ones are no error."""
    mounts.unmount(scratch, lazy=True)
    with contextlib.suppress(FileNotFoundError):
        for target in scratch.iterdir():  # of an agent that mounted each on its own
            mounts.unmount(target, lazy=True)
            target.rmdir()
        scratch.rmdir()
