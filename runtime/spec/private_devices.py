"""The /dev of a container with a user namespace, which the agent prepares.

A user namespace may not make device nodes, so OCI runtimes bind those of the node into it, and give one of them to the
container's root where it is a standard stream. The agent makes nodes of the container's own instead.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.spec import oci

_DEFAULT_NODES = (("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0))
_KINDS = {"b": stat.S_IFBLK, "c": stat.S_IFCHR, "u": stat.S_IFCHR, "p": stat.S_IFIFO}
_OPTIONS = ("bind", "nosuid")

Mappings = tuple[Sequence[oci.IDMapping], Sequence[oci.IDMapping]]


@dataclass(frozen=True, slots=True)
class PrivateNode:
    """One node: where it is in the folder, what it is, and its uid and gid on the host; ``path`` is for errors."""

    place: str
    path: str
    mode: int
    device: int
    owner: tuple[int, int]


@dataclass(frozen=True, slots=True)
class PrivateDevices:
    """What is to be made in ``folder``: ``dev``, which ``root`` (uid and gid on the host) owns, with the nodes.

    ``label`` is the SELinux label of all of it.
    """

    folder: Path
    nodes: tuple[PrivateNode, ...]
    root: tuple[int, int]
    label: str

    @property
    def dev(self) -> Path:
        """What is mounted at /dev."""
        return self.folder / "dev"


def private_devices(
    rootfs: Path, wanted: Iterable[oci.Device], described: Sequence[oci.Device], mappings: Mappings, label: str
) -> tuple[PrivateDevices, list[oci.Mount]]:
    """What to make beside ``rootfs`` for the default nodes and those ``wanted``, and the mounts that show it.

    The nodes belong to whom they belong to on the host, and so to nobody inside; those ``described``
    (of CDI) to the ids that their description names, which are the container's.
    """
    folder = devices_folder(rootfs)
    nodes = [
        PrivateNode(f"dev/{name}", f"/dev/{name}", stat.S_IFCHR | 0o666, os.makedev(major, minor), (0, 0))
        for name, major, minor in _DEFAULT_NODES
    ]
    mounts = [oci.Mount(destination="/dev", type="bind", source=str(folder / "dev"), options=[*_OPTIONS, "rw"])]
    for number, device in enumerate(wanted):
        inside = device.path.startswith("/dev/")
        place = device.path.lstrip("/") if inside else f"others/{number}"
        owner = (device.uid or 0, device.gid or 0)
        if device in described:
            owner = (_on_host(owner[0], mappings[0]), _on_host(owner[1], mappings[1]))
        mode = _KINDS[device.type] | (0o666 if device.file_mode is None else device.file_mode & 0o7777)
        nodes.append(PrivateNode(place, device.path, mode, os.makedev(device.major or 0, device.minor or 0), owner))
        if not inside:
            options = [*_OPTIONS, "noexec", "rw"]
            mounts.append(oci.Mount(destination=device.path, type="bind", source=str(folder / place), options=options))
    root = (_on_host(0, mappings[0]), _on_host(0, mappings[1]))
    return PrivateDevices(folder, tuple(nodes), root, label), mounts


def devices_folder(rootfs: Path) -> Path:
    """Where the devices of the container with root ``rootfs`` are made."""
    return rootfs.with_name("devices")


def _on_host(inside: int, mappings: Iterable[oci.IDMapping]) -> int:
    """The host's id of an id inside; root's, which nobody inside is, for one that is not mapped."""
    for mapping in mappings:
        if mapping.container_id <= inside < mapping.container_id + mapping.size:
            return mapping.host_id + inside - mapping.container_id
    return 0
