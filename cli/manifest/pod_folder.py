"""The folder that ``podkeel run`` makes for each pod (logs, emptyDir volumes) and ``podkeel rm`` removes."""

from __future__ import annotations

from pathlib import Path

from host.errors import PodkeelError
from host.files.removal import remove_tree
from proto.runtime.v1 import cri_pb2


def path(parent: str | Path, metadata: cri_pb2.PodSandboxMetadata) -> Path:
    """Where the pod's folder is, whether it exists or not."""
    return Path(parent) / f"{metadata.namespace}_{metadata.name}_{metadata.uid}".replace("/", "_")


def remove(parent: str | Path, metadata: cri_pb2.PodSandboxMetadata) -> None:
    """Remove the pod's folder. Only pods made by ``podkeel run`` have one."""
    folder = path(parent, metadata)
    if not folder.is_symlink() and not folder.is_dir():
        return
    if told := remove_tree(folder):
        raise PodkeelError(f"pod folder {folder} could not be removed: {told[0]}")
