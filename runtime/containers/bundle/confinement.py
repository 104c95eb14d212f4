"""Checks a container that is created and does not run yet.

Other processes may change a volume while the OCI runtime resolves paths in it. No process of the container runs before
its start, so the results of these checks stay valid until then.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from host.errors import InvalidArgumentError
from host.files.mounts import MountEntry, mount_id, mount_table
from host.processes import ProcessName
from runtime.specgen import config
from runtime.specgen.builder import ContainerSpec
from runtime.specgen.mounts.private_devices import DEFAULT_NODES

_OPENED = frozenset(
    ("/", "/dev", "/dev/pts", "/dev/ptmx", "/dev/console", *(f"/dev/{name}" for name in DEFAULT_NODES.values()))
)
_KERNEL_FILESYSTEMS = {"/proc": "proc", "/sys": "sysfs"}
# Mounts that the node itself has in /sys and /proc, for containers that bind mount these.
_OF_THE_NODE = frozenset(
    (
        *("autofs", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "efivarfs", "fusectl"),
        *("hugetlbfs", "nsfs", "proc", "pstore", "resctrl", "securityfs", "selinuxfs", "sysfs", "tracefs"),
    )
)


def needs_verifying(spec: ContainerSpec, *, refuses_outside: bool) -> bool:
    """Whether paths of ``spec`` are in volumes, so that earlier results may no longer be valid.

    ``refuses_outside``: the OCI runtime itself checks that it is in the container.
    """
    return spec.mounts_in_volumes or (spec.directory_in_volume and not refuses_outside)


def verify(init: ProcessName, spec: ContainerSpec) -> None:
    """Check the working directory and the mounts of the first process of a created container. Blocks.

    Raises InvalidArgumentError if a link in a volume led them out of the container, or onto the kernel's file systems.
    """
    try:
        table = list(mount_table(f"/proc/{init.pid}/mountinfo"))
        _verify_directory(init, spec.spec.process.cwd, table)
    except (FileNotFoundError, ProcessLookupError):
        return  # it has ended, and cannot be started
    if spec.mounts_in_volumes:
        _verify_mounts(spec.spec, table)
        _verify_devices(spec.spec, table)


def _verify_directory(init: ProcessName, directory: str, table: Iterable[MountEntry]) -> None:
    descriptor = os.open(f"/proc/{init.pid}/cwd", os.O_PATH | os.O_CLOEXEC)
    try:
        if mount_id(descriptor) in {entry.mount_id for entry in table}:
            return
    finally:
        os.close(descriptor)
    raise InvalidArgumentError(
        f"working_dir {directory!r} led out of the container through a link that was put into a volume: "
        "use a working directory outside of volumes that other processes change"
    )


def _verify_mounts(spec: config.Spec, table: Iterable[MountEntry]) -> None:
    """Check that mounts in /proc and /sys are the kernel's, or are requested with exactly this destination."""
    by_name = {mount.destination for mount in spec.mounts} | {*spec.linux.masked_paths, *spec.linux.readonly_paths}
    by_name -= {mount.destination for mount in spec.mounts if mount.type in _KERNEL_FILESYSTEMS.values()}
    for entry in table:
        folder = "/" + entry.target.split("/")[1]
        if folder not in _KERNEL_FILESYSTEMS or entry.target in by_name:
            continue
        expected = {_KERNEL_FILESYSTEMS[folder]} if entry.target == folder else _OF_THE_NODE
        if entry.filesystem not in expected:
            raise _led_to(entry.target)


def _verify_devices(spec: config.Spec, table: Iterable[MountEntry]) -> None:
    """Check that the root, /dev and the devices that OCI runtimes open have only the requested mounts, each once.

    Other mounts below /dev may belong to an OCI runtime that adds devices. The node's /dev has its own mounts.
    """
    if any(mount.destination == "/dev" and _is_host_dev(mount.source) for mount in spec.mounts):
        return
    left = Counter(mount.destination for mount in spec.mounts)
    left["/"] += 1
    left["/dev/console"] += spec.process.terminal
    for entry in table:
        if entry.target in _OPENED:
            left[entry.target] -= 1
            if left[entry.target] < 0:
                raise _led_to(entry.target)


def _is_host_dev(source: str) -> bool:
    try:
        return Path(source).samefile("/dev")
    except OSError:
        return False


def _led_to(target: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"mounts: a volume was mounted on {target} through a link that was put into another volume: "
        "mount it outside of volumes that other processes change"
    )
