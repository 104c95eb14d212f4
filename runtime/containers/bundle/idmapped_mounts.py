"""Bind mounts of volumes with mapped ids: made for a container, and removed with it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from host.files import mounts
from runtime.namespaces.user import Mappings, user_namespace
from runtime.specgen.mounts.idmapped import MappedVolume, mapped_folder


def bind_all(
    volumes: Iterable[MappedVolume],
    pod_namespace: str | None,
    pod_mappings: Mappings | None,
    step: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> None:
    """Bind mount each volume onto its target. Blocks. If it fails, ``release`` removes the mounts that were made.

    Each mount is made inside a ``step``. The volume, which may hang, is read outside of steps. ``pod_namespace`` is
    where the pod's user namespace is pinned. Raises UnsupportedError if the volume's file system has no idmapped
    mounts.
    """
    for volume in volumes:
        is_folder = Path(volume.source).is_dir()
        with step():
            volume.target.parent.mkdir(mode=0o711, exist_ok=True)
            if is_folder:
                volume.target.mkdir()
            else:
                volume.target.touch()
        with contextlib.ExitStack() as stack:
            if pod_namespace is not None and pod_mappings == (volume.uids, volume.gids):
                namespace = pod_namespace
            else:
                namespace = stack.enter_context(user_namespace((volume.uids, volume.gids)))
            mounts.bind_with_ids(volume.source, volume.target, namespace, slave_tree=volume.follows_host, step=step)


def release(rootfs: Path) -> None:
    """Unmount the volumes of the container with root ``rootfs``. Blocks. May be repeated.

    Nothing is ever deleted through a bind mount: a target that cannot be unmounted raises OSError.
    """
    folder = mapped_folder(rootfs)
    if not folder.exists():
        return
    for target in folder.iterdir():
        mounts.unmount(target, lazy=True)
        if target.is_dir():
            target.rmdir()
        else:
            target.unlink()
    folder.rmdir()
