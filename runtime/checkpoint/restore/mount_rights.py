"""Compares the mounts of a checkpoint with the mounts and restrictions of the new container's spec."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from host.errors import InvalidArgumentError, UnsupportedError
from proto.criu.v1 import images_pb2
from runtime.specgen import config

# File systems (fstype of mnt.proto) by the types of OCI mounts.
_KINDS = {1: "proc", 2: "sysfs", 5: "tmpfs", 6: "devpts", 12: "cgroup", 14: "mqueue", 23: "cgroup"}
_LEGACY_CGROUP = 12
_FLAGS = {"ro": 1, "nosuid": 2, "nodev": 4, "noexec": 8}
# Options of a mount that receives or sends mount events of the node, by the field of an entry that shows it.
_SHARING = {"shared_id": {"shared", "rshared"}, "master_id": {"slave", "rslave", "shared", "rshared"}}


def check_mounts(mounts: Iterable[images_pb2.Mount], spec: config.Spec) -> None:
    """Check that the spec has every mount of the checkpoint, and that none of them is less restricted.

    Raises InvalidArgumentError or UnsupportedError for another mount.
    """
    wanted = {mount.destination.rstrip("/") or "/": mount for mount in spec.mounts}
    seen: dict[str, int] = {}
    for mount in mounts:
        place = mount.mountpoint.removeprefix(".").rstrip("/") or "/"
        if place in seen:
            raise InvalidArgumentError(f"the checkpoint has several mounts at {place[:100]}")
        seen[place] = mount.flags
        if mount.with_plugin:
            raise UnsupportedError(f"the checkpoint has a mount at {place[:100]} that a plugin of CRIU makes")
        if mount.ext_key and mount.ext_key.rstrip("/") != place:
            raise InvalidArgumentError(f"the checkpoint has a mount at {place[:100]} that belongs elsewhere")
        if place != "/" and not mount.ext_key and not _is_wanted(mount, place, spec, wanted):
            raise InvalidArgumentError(f"the checkpoint has a mount at {place[:100]} that the configuration lacks")
        _check_restrictions(mount, place, wanted)
    for place in wanted:
        if place not in seen:
            raise InvalidArgumentError(
                f"the configuration mounts {place[:100]}, but not the checkpoint: the mounts must be the same"
            )
    _check_restricted(seen, spec)


def _is_wanted(mount: images_pb2.Mount, place: str, spec: config.Spec, wanted: Mapping[str, config.Mount]) -> bool:
    """Whether the spec has the mount, as a separate mount or as part of a mounted hierarchy."""
    kind = _KINDS.get(mount.fstype)
    given = wanted[place].type if place in wanted else ""
    above = wanted.get(place.rpartition("/")[0])
    if mount.fstype == _LEGACY_CGROUP:  # CRIU would mount the whole hierarchy: the OCI runtime passes these
        return False
    return (
        (kind is not None and given == kind)
        or (kind == "tmpfs" and (given == "cgroup" or place in spec.linux.masked_paths))
        or (kind == "cgroup" and above is not None and above.type == "cgroup")
        or (kind == "proc" and place in spec.linux.readonly_paths)
    )


def _check_restrictions(mount: images_pb2.Mount, place: str, wanted: Mapping[str, config.Mount]) -> None:
    """Check the flags: CRIU sets a mount's flags from its image, also for mounts that the OCI runtime passes."""
    above = wanted.get(place.rpartition("/")[0])
    if above is not None and above.type == "cgroup":  # a hierarchy of version 1
        options = above.options
    elif place in wanted and wanted[place].type == "cgroup" and _KINDS.get(mount.fstype) == "tmpfs":
        options = [option for option in wanted[place].options if option != "ro"]  # the folder of the hierarchies
    else:
        options = wanted[place].options if place in wanted else []
    for option in options:
        bit = _FLAGS.get(option, 0)
        if bit and not mount.flags & bit:
            raise InvalidArgumentError(f"the mount at {place} does not have {option!r} in the checkpoint")
    for member, allowing in _SHARING.items():
        if getattr(mount, member) and place != "/" and allowing.isdisjoint(options):
            raise InvalidArgumentError(f"the mount at {place[:100]} is shared with the node in the checkpoint")


def _check_restricted(seen: Mapping[str, int], spec: config.Spec) -> None:
    """Check that the checkpoint's mounts ``seen`` mask or make read-only what the configuration does."""
    for place in spec.linux.readonly_paths:
        if Path(place).exists() and not seen.get(place, 0) & _FLAGS["ro"]:
            raise InvalidArgumentError(f"{place} is not read-only in the checkpoint, as the configuration requires")
    for place in spec.linux.masked_paths:
        if Path(place).exists() and place not in seen:
            raise InvalidArgumentError(f"{place} is not masked in the checkpoint, as the configuration requires")
    if spec.root.readonly and not seen.get("/", 0) & _FLAGS["ro"]:
        raise InvalidArgumentError("the root file system is not read-only in the checkpoint")
