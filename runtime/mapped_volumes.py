"""Binding volumes with mapped ids for a container, and taking them away with it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from host import mounts
from runtime.spec.mapped_volumes import MappedVolume, mapped_folder
from runtime.user_namespace import Mappings, user_namespace


def bind_all(volumes: Iterable[MappedVolume], pod_namespace: str | None, pod_mappings: Mappings | None) -> None:
    """Bind each volume at its target; blocks. What was bound when it fails is for ``release``.

    ``pod_namespace`` is where the pod's user namespace is pinned. Raises UnsupportedError where the volume's file
    system has no mapped mounts.
    """
    for volume in volumes:
        volume.target.parent.mkdir(mode=0o711, exist_ok=True)
        if Path(volume.source).is_dir():
            volume.target.mkdir()
        else:
            volume.target.touch()
        with contextlib.ExitStack() as stack:
            if pod_namespace is not None and pod_mappings == (volume.uids, volume.gids):
                namespace = pod_namespace
            else:
                namespace = stack.enter_context(user_namespace((volume.uids, volume.gids)))
            mounts.bind_with_ids(volume.source, volume.target, namespace, slave_tree=volume.follows_host)


def release(rootfs: Path) -> None:
    """Unbind the volumes of the container with root ``rootfs``; blocks, repeatable.

    Nothing is ever deleted through a bind: a target that cannot be freed raises OSError.
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
