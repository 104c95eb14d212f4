"""A checkpoint in an image: its folder on this node, and the files that a container is restored from."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import TypeVar

import msgspec

from host import untrusted_json
from host.errors import InvalidArgumentError
from host.untrusted_json import JsonError
from proto.criu.v1 import images_pb2
from runtime.checkpoint import documents
from runtime.checkpoint.documents import ConfigDump
from runtime.checkpoint.restore import criu_images, process_images, tmpfs_images, volume_files
from runtime.specgen import config

T = TypeVar("T")

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")
_HOST_NAMES = re.compile(r"utsns-\d+\.img")
_MAGIC = 8  # bytes before the entries of most images
_NO_NETWORK_LOCK = 3  # of CRIU's network_lock_method
_MAX_IMAGES = 20_000
_MAX_DELETED = 1_000_000
_MAX_DELETED_BYTES = 256 << 20
# Images of processes, their memory and their files. Others are left out: with them CRIU could change the network, load
# security policies or mount.
_RESTORED = re.compile(
    r"(?:(?:fdinfo|fs|ids|ipcns-(?:var|shm|msg|sem)|mm|mountpoints|netns|pagemap|pagemap-shmem|pages|pidns|timens"
    r"|ghost-file|tcp-stream|memfd|posix-mqueue|aio)-[0-9a-f]+"
    r"|files|reg-files|fifo|fifo-data|filelocks|memfd|pipes|pipes-data|pstree|remap-fpath|seccomp|sk-queues|timens-0)\.img"
)


def read_config(layer: Path) -> ConfigDump:
    """The checkpointed container. Raises InvalidArgumentError."""
    return _decoded(layer / documents.CONFIG, ConfigDump)


def deleted_names(layer: Path) -> list[str]:
    """The files of the image that the container had removed, as clean relative paths. Raises InvalidArgumentError."""
    path = layer / documents.DELETED
    if not path.is_file():
        return []
    names = _decoded(path, list[str], max_bytes=_MAX_DELETED_BYTES, max_values=_MAX_DELETED)
    cleaned = [name.strip("/") for name in names]
    for name in cleaned:
        if not name or "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise InvalidArgumentError(f"the checkpoint's {documents.DELETED} has the invalid name {name[:100]!a}")
    return cleaned


def link_images(layer: Path, target: Path) -> None:
    """Create the folder ``target`` with the images of a checkpoint, as links to the files of the layer. Blocks.

    The memory of the processes is read from the layer's own files. Images that would be instructions for CRIU and the
    OCI runtime are left out: ``rewrite`` makes them. Raises InvalidArgumentError for anything but files with plain
    names.
    """
    target.mkdir(mode=0o700)
    source = os.open(layer / documents.IMAGES, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with os.scandir(source) as found:
            names = [entry.name for entry in found]
        if len(names) > _MAX_IMAGES:
            raise InvalidArgumentError(f"the checkpoint has more than {_MAX_IMAGES} images")
        for name in names:
            status = os.stat(name, dir_fd=source, follow_symlinks=False)
            if not _PLAIN_NAME.fullmatch(name) or not stat.S_ISREG(status.st_mode):
                raise InvalidArgumentError(f"the checkpoint has {name[:100]!a}, which is not an image of CRIU")
            if _RESTORED.fullmatch(name):
                os.link(name, target / name, src_dir_fd=source, follow_symlinks=False)
    finally:
        os.close(source)


def rewrite(layer: Path, target: Path, cgroup_set: int, process: config.Process, hostname: str) -> None:
    """Rewrite the images that decide about cgroups, limits and standard streams, so that the checkpoint cannot. Blocks.

    All processes stay in CRIU's own cgroup, with the limits of ``process`` at most. Only the three standard streams are
    connected. The pod keeps its ``hostname``.
    """
    process_images.write_again(layer / documents.IMAGES, target, process)
    volume_files.forget_sizes(layer / documents.IMAGES, target)
    for image in sorted((layer / documents.IMAGES).iterdir()):
        if tmpfs_images.NAME.fullmatch(image.name):
            tmpfs_images.write_again(image, target / image.name)
        if _HOST_NAMES.fullmatch(image.name):
            _rename(image, target / image.name, hostname)
    inventory = layer / documents.IMAGES / "inventory.img"
    entry = next(criu_images.entries(inventory, images_pb2.Inventory, criu_images.INVENTORY_MAGIC))
    entry.root_cg_set = cgroup_set
    # Nothing is locked, as connections are closed: CRIU would run iptables twice without finding its rules.
    entry.network_lock_method = _NO_NETWORK_LOCK
    begin = inventory.read_bytes()[: criu_images.INVENTORY_MAGIC]
    criu_images.write(target / "inventory.img", begin, entry)
    cgroups = layer / documents.IMAGES / "cgroup.img"
    (target / "cgroup.img").write_bytes(cgroups.read_bytes()[:_MAGIC])
    streams: list[str] = _decoded(layer / documents.IMAGES / "descriptors.json", list[str])
    kept = [stream if re.fullmatch(r"pipe:\[\d{1,20}\]", stream) else "/dev/null" for stream in streams[:3]]
    (target / "descriptors.json").write_bytes(msgspec.json.encode(kept))


def _rename(image: Path, target: Path, hostname: str) -> None:
    names = next(criu_images.entries(image, images_pb2.HostNames), None)
    if names is None:
        raise InvalidArgumentError(f"the checkpoint's {image.name} is broken")
    names.nodename = hostname
    criu_images.write(target, image.read_bytes()[:_MAGIC], names)


def _decoded(path: Path, kind: type[T], *, max_bytes: int = untrusted_json.MAX_BYTES, max_values: int = 50_000) -> T:
    try:
        content = untrusted_json.read_file(path, max_bytes)
        return untrusted_json.decode(content, kind, max_bytes=max_bytes, max_values=max_values)
    except (JsonError, OSError) as error:
        raise InvalidArgumentError(f"the checkpoint's {path.name} cannot be read: {error}") from error
