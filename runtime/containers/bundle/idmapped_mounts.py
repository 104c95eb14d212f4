"""Binding volumes with mapped ids for a container, and taking them away with it."""

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
    """Bind each volume at its target; blocks. What was bound when it fails is for ``release``.

    Each thing that is made is made within a ``step``; looking at the volume, which may hang, is not.
    ``pod_namespace`` is where the pod's user namespace is pinned. Raises UnsupportedError where the volume's file
    system has no mapped mounts.
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
