"""The device nodes of a container, and the rules of its device cgroup."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from host.errors import InvalidArgumentError
from proto.runtime.v1 import cri_pb2
from runtime.specgen import config
from runtime.specgen.cdi import DeviceNode
from runtime.specgen.mounts.configured import container_path

# The OCI runtime itself makes these in every container.
_RUNTIME_OWN = frozenset(("null", "zero", "full", "random", "urandom", "tty", "console", "ptmx"))
_NO_DEVICES = frozenset(("pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev"))

_DENY_ALL = config.DeviceRule(allow=False, access="rwm")
_ALLOW_ALL = config.DeviceRule(allow=True, access="rwm")


def devices(
    given: Iterable[cri_pb2.Device], *, all_of_host: bool
) -> tuple[list[config.Device], list[config.DeviceRule]]:
    """Nodes to create, and rules that deny everything else. ``all_of_host`` is for privileged containers.

    A ``host_path`` that is a folder means every device in it, at any depth.
    """
    nodes: dict[str, config.Device] = {}
    rules = [_ALLOW_ALL] if all_of_host else [_DENY_ALL]
    if all_of_host:
        for path, status in _in_folder("/dev", _RUNTIME_OWN):
            nodes[path] = _node(path, status)
    for device in given:
        permissions = _permissions(device.permissions, device.host_path)
        for path, status in _located(device):
            nodes[path] = _node(path, status)
            if not all_of_host:
                rules.append(
                    config.DeviceRule(
                        allow=True,
                        type=_kind(status),
                        major=os.major(status.st_rdev),
                        minor=os.minor(status.st_rdev),
                        access=permissions,
                    )
                )
    return list(nodes.values()), rules


def described_devices(
    given: Iterable[DeviceNode], *, uid: int, gid: int
) -> tuple[list[config.Device], list[config.DeviceRule]]:
    """As ``devices``, for CDI descriptions. The container's user owns the nodes, unless a description sets an owner."""
    nodes, rules = [], []
    for wanted in given:
        path = container_path(wanted.path, "CDI: device path")
        kind: str = wanted.type
        major, minor, mode = wanted.major, wanted.minor, wanted.file_mode
        if not kind or major is None or minor is None:
            try:
                status = Path(wanted.host_path or wanted.path).stat()
            except OSError as error:
                raise InvalidArgumentError(
                    f"CDI: device {wanted.host_path or wanted.path}: {error.strerror}"
                ) from error
            found = _node(path, status)
            kind, major, minor = found.type, found.major, found.minor
            mode = found.file_mode if mode is None else mode
            if not kind:
                raise InvalidArgumentError(
                    f"CDI: {wanted.host_path or wanted.path} is not a device: correct the description"
                )
        nodes.append(
            config.Device(
                path=path,
                type=kind,
                major=major,
                minor=minor,
                file_mode=mode,
                uid=wanted.uid if wanted.uid is not None else uid or None,
                gid=wanted.gid if wanted.gid is not None else gid or None,
            )
        )
        access = _permissions(wanted.permissions, wanted.path)
        if kind in ("b", "c"):
            rules.append(config.DeviceRule(allow=True, type=kind, major=major, minor=minor, access=access))
    return nodes, rules


def _permissions(given: str, path: str) -> str:
    permissions = given or "rwm"
    if set(permissions) - set("rwm") or len(set(permissions)) != len(permissions):
        raise InvalidArgumentError(
            f"devices: {path}: permissions {permissions!r} are invalid: use r, w and m, each at most once"
        )
    return permissions


def _located(device: cri_pb2.Device) -> Iterator[tuple[str, os.stat_result]]:
    """The path of each device in the container, and its status on the host."""
    if not device.host_path.startswith("/"):
        raise InvalidArgumentError(
            f"devices: host_path {device.host_path!r} is not absolute: give the device's full path"
        )
    inside = container_path(device.container_path or device.host_path, "devices: container_path")
    try:
        host_path = os.path.realpath(device.host_path, strict=True)
        status = Path(host_path).stat()
        if not stat.S_ISDIR(status.st_mode):
            if not _kind(status):
                raise InvalidArgumentError(f"devices: {device.host_path} is neither a device nor a folder of devices")
            yield inside, status
            return
        for path, found in _in_folder(host_path, frozenset()):
            yield inside + path[len(host_path) :], found
    except OSError as error:
        raise InvalidArgumentError(
            f"devices: {device.host_path} cannot be used: {error.strerror}; name a device of this node"
        ) from error


def _in_folder(folder: str, skipped: frozenset[str]) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                if entry.name not in _NO_DEVICES:
                    yield from _in_folder(entry.path, frozenset())
            elif entry.name not in skipped and not entry.is_file(follow_symlinks=False):
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # devices are added and removed at any time
                    continue
                if _kind(status) in ("b", "c"):
                    yield entry.path, status


def _kind(status: os.stat_result) -> str:
    if stat.S_ISCHR(status.st_mode):
        return "c"
    return "b" if stat.S_ISBLK(status.st_mode) else ""


def _node(path: str, status: os.stat_result) -> config.Device:
    return config.Device(
        path=path,
        type=_kind(status),
        major=os.major(status.st_rdev),
        minor=os.minor(status.st_rdev),
        file_mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
    )
