"""Volumes whose files a container sees with other owners (KEP-127).

Not every OCI runtime can mount them, and those that can fail where namespaces are shared: the agent binds each to a
place of the container's own with mapped ids, and the runtime mounts it from there like any other volume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from host.errors import InvalidArgumentError
from proto.runtime.v1 import cri_pb2
from runtime.specgen import config
from runtime.specgen.namespaces import id_mappings


@dataclass(frozen=True, slots=True)
class MappedVolume:
    """``source`` on the host is to be bound at ``target`` with these mappings before the container is created.

    ``follows_host``: mounts made on the host later appear too.
    """

    source: str
    target: Path
    uids: Sequence[config.IDMapping]
    gids: Sequence[config.IDMapping]
    follows_host: bool


def mapped_folder(rootfs: Path) -> Path:
    """Where a container's mapped volumes are bound, beside its root."""
    return rootfs.with_name("mapped")


def mapped_volume(mount: cri_pb2.Mount, source: str, target: Path) -> MappedVolume | None:
    """The source to bind for a mount of the configuration; None if it maps no ids."""
    if not mount.uidMappings and not mount.gidMappings:
        return None
    field = f"mounts: {mount.container_path}"
    if not (mount.uidMappings and mount.gidMappings):
        raise InvalidArgumentError(f"{field}: uidMappings and gidMappings belong together: give both")
    if mount.propagation == cri_pb2.MountPropagation.PROPAGATION_BIDIRECTIONAL:
        raise InvalidArgumentError(
            f"{field}: a volume with mapped ids cannot be bidirectional: use another propagation"
        )
    return MappedVolume(
        source,
        target,
        id_mappings(mount.uidMappings, f"{field}: uidMappings"),
        id_mappings(mount.gidMappings, f"{field}: gidMappings"),
        mount.propagation == cri_pb2.MountPropagation.PROPAGATION_HOST_TO_CONTAINER,
    )
