"""Makes a container's own device nodes, and removes them with the container."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from host import libc
from host.errors import InvalidArgumentError
from host.files import mounts
from runtime.specgen.mounts.private_devices import PrivateDevices, PrivateNode, devices_folder

_FOLDERS = ("pts", "shm", "mqueue")
_LINKS = (
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("core", "/proc/kcore"),
    ("ptmx", "pts/ptmx"),
)


def make(devices: PrivateDevices) -> None:
    """Make the devices on a separate tmpfs. Blocks for a millisecond. ``release`` removes them, also after a failure.

    Raises InvalidArgumentError for a device whose path is taken.
    """
    devices.folder.mkdir(mode=0o711, exist_ok=True)
    options = f"mode=0711,size=65536k{mounts.context_option(devices.label)}"
    libc.mount("devices", str(devices.folder), "tmpfs", mounts.MS_NOSUID, options)
    (devices.folder / "others").mkdir(mode=0o711)
    if devices.root is not None:
        _make_dev(devices.dev, devices.root)
    for node in devices.nodes:
        try:
            _make_node(devices, node)
        except OSError as error:
            raise InvalidArgumentError(
                f"devices: {node.path} cannot be made in the container: {error.strerror}; use another container_path"
            ) from error


def _make_dev(dev: Path, root: tuple[int, int]) -> None:
    _make_folder(dev, root)
    for name in _FOLDERS:
        _make_folder(dev / name, root)
    for name, target in _LINKS:
        link = dev / name
        link.symlink_to(target)
        os.chown(link, *root, follow_symlinks=False)
    console = dev / "console"  # over which OCI runtimes mount a terminal
    console.touch(mode=0o600)
    os.chown(console, *root)


def _make_node(devices: PrivateDevices, node: PrivateNode) -> None:
    path = devices.folder / node.place
    for parent in reversed(path.relative_to(devices.folder).parents[:-1]):
        if not (devices.folder / parent).exists():
            _make_folder(devices.folder / parent, devices.root or (0, 0))
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    os.mknod(path, node.mode & ~0o7777 | 0o600, node.device)
    os.chown(path, *node.owner)
    path.chmod(node.mode & 0o7777)


def _make_folder(path: Path, owner: tuple[int, int]) -> None:
    path.mkdir()
    path.chmod(0o755)
    os.chown(path, *owner)


def release(rootfs: Path) -> None:
    """Unmount the devices of the container with root ``rootfs``. Blocks. May be repeated."""
    folder = devices_folder(rootfs)
    if folder.exists():
        mounts.unmount(folder, lazy=True)
        folder.rmdir()
