"""Device nodes that the agent makes for a container, instead of those of the node.

A user namespace cannot create device nodes, so OCI runtimes bind mount those of the node. If one is a standard stream,
they change its owner to the container's root. A volume can have them too, such as /dev/null to mask a file.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from runtime.specgen import config
from runtime.specgen.mounts.configured import in_order
from runtime.specgen.mounts.defaults import DEFAULT_DEV

DEFAULT_NODES = {
    os.makedev(1, 3): "null",
    os.makedev(1, 5): "zero",
    os.makedev(1, 7): "full",
    os.makedev(1, 8): "random",
    os.makedev(1, 9): "urandom",
    os.makedev(5, 0): "tty",
}
"""The devices of every container, by number."""

_KINDS = {"b": stat.S_IFBLK, "c": stat.S_IFCHR, "u": stat.S_IFCHR, "p": stat.S_IFIFO}
_OPTIONS = ("bind", "nosuid")

Mappings = tuple[Sequence[config.IDMapping], Sequence[config.IDMapping]]


@dataclass(frozen=True, slots=True)
class PrivateNode:
    """One node: its place in the folder, its kind, and its uid and gid on the host. ``path`` is for errors."""

    place: str
    path: str
    mode: int
    device: int
    owner: tuple[int, int]


@dataclass(frozen=True, slots=True)
class PrivateDevices:
    """The files to make in ``folder``: the nodes and, if a ``root`` (uid and gid on the host) owns it, ``dev``.

    ``label`` is the SELinux label of all of them.
    """

    folder: Path
    nodes: tuple[PrivateNode, ...]
    root: tuple[int, int] | None
    label: str

    @property
    def dev(self) -> Path:
        """The mount at /dev."""
        return self.folder / "dev"


def prepare(
    rootfs: Path,
    linux: config.Linux,
    mounts: Sequence[config.Mount],
    *,
    described: Sequence[config.Device],
    folders: Mapping[str, str],
    label: str,
) -> tuple[PrivateDevices | None, list[config.Mount]]:
    """The files to make beside ``rootfs``, and their mounts. Their devices are removed from ``linux``.

    With a user namespace these are /dev, unless the node's is mounted there, and all devices. The nodes keep their
    owners of the host, which are not mapped inside. Those ``described`` (by CDI) get the ids of their description,
    which are ids of the container. Default nodes in volumes are always replaced: each mount gets a separate one.
    ``folders`` maps a source that is bind mounted later to the present folder of its content.
    """
    folder = devices_folder(rootfs)
    nodes: list[PrivateNode] = []
    shown = [_with_own_source(mount, folders.get(mount.source, mount.source), folder, nodes) for mount in mounts]
    root = None
    if linux.uid_mappings and DEFAULT_DEV in shown:
        mappings = (linux.uid_mappings, linux.gid_mappings)
        root = (_on_host(0, mappings[0]), _on_host(0, mappings[1]))
        dev = config.Mount(destination="/dev", type="bind", source=str(folder / "dev"), options=[*_OPTIONS, "rw"])
        nodes += [_default_node(f"dev/{name}", f"/dev/{name}", device) for device, name in DEFAULT_NODES.items()]
        others = [_add_node(device, device in described, mappings, folder, nodes) for device in linux.devices]
        shown = in_order([dev if mount == DEFAULT_DEV else mount for mount in shown], [m for m in others if m])
        linux.devices = []
    return PrivateDevices(folder, tuple(nodes), root, label) if nodes else None, shown


def _with_own_source(mount: config.Mount, source: str, folder: Path, nodes: list[PrivateNode]) -> config.Mount:
    """``mount``, or a mount of an added node if ``source`` is one of the default nodes."""
    if mount.type != "bind":
        return mount
    try:
        status = Path(source).stat()
    except OSError:
        return mount
    if not stat.S_ISCHR(status.st_mode) or status.st_rdev not in DEFAULT_NODES:
        return mount
    place = f"others/{len(nodes)}"
    nodes.append(_default_node(place, mount.destination, status.st_rdev))
    return msgspec.structs.replace(mount, source=str(folder / place))


def _default_node(place: str, path: str, device: int) -> PrivateNode:
    return PrivateNode(place, path, stat.S_IFCHR | 0o666, device, (0, 0))


def _add_node(
    device: config.Device, described: bool, mappings: Mappings, folder: Path, nodes: list[PrivateNode]
) -> config.Mount | None:
    """Add the node of a device. Returns its mount if the path is not in /dev."""
    inside = device.path.startswith("/dev/")
    place = device.path.lstrip("/") if inside else f"others/{len(nodes)}"
    owner = (device.uid or 0, device.gid or 0)
    if described:
        owner = (_on_host(owner[0], mappings[0]), _on_host(owner[1], mappings[1]))
    mode = _KINDS[device.type] | (0o666 if device.file_mode is None else device.file_mode & 0o7777)
    nodes.append(PrivateNode(place, device.path, mode, os.makedev(device.major or 0, device.minor or 0), owner))
    if inside:
        return None
    options = [*_OPTIONS, "noexec", "rw"]
    return config.Mount(destination=device.path, type="bind", source=str(folder / place), options=options)


def devices_folder(rootfs: Path) -> Path:
    """The folder in which the devices of the container with root ``rootfs`` are made."""
    return rootfs.with_name("devices")


def _on_host(inside: int, mappings: Iterable[config.IDMapping]) -> int:
    """The host's id of an id inside. For an id that is not mapped, the id of the host's root, which is not mapped
    either.
    """
    for mapping in mappings:
        if mapping.container_id <= inside < mapping.container_id + mapping.size:
            return mapping.host_id + inside - mapping.container_id
    return 0
