"""Volumes whose files have other owners inside a container (KEP-127).

Not every OCI runtime can mount them, and those that can fail with shared namespaces. So the agent bind mounts each with
mapped ids in the container's folder, and the OCI runtime mounts it from there like any other volume.
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
    """``source`` on the host must be bind mounted at ``target`` with these mappings before the container is created.

    ``follows_host``: mounts that are made on the host later appear too.
    """

    source: str
    target: Path
    uids: Sequence[config.IDMapping]
    gids: Sequence[config.IDMapping]
    follows_host: bool


def mapped_folder(rootfs: Path) -> Path:
    """The folder, beside a container's root, in which its mapped volumes are bind mounted."""
    return rootfs.with_name("mapped")


def mapped_volume(mount: cri_pb2.Mount, source: str, target: Path) -> MappedVolume | None:
    """The volume to bind mount for a mount of the configuration. None if the mount maps no ids."""
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
