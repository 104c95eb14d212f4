"""The mounts of every container, unless its configuration mounts something else there."""

from __future__ import annotations

import os
from pathlib import Path

from host.errors import InvalidArgumentError
from runtime.specgen import config
from runtime.specgen.facts import SandboxFiles
from runtime.specgen.namespaces import NamespacePaths

TTY_GROUP = 5

DEFAULT_DEV = config.Mount(
    destination="/dev", type="tmpfs", source="tmpfs", options=["nosuid", "strictatime", "mode=755", "size=65536k"]
)
"""The /dev that OCI runtimes fill, if the container has no user namespace."""


def refuse_linked_targets(rootfs: Path) -> None:
    """Raise InvalidArgumentError if the image has a symbolic link where the kernel's file systems are mounted.

    No image needs such a link. runc (1.1) follows it out of the container when it creates the links of /dev.
    """
    for name in ("proc", "sys", "dev"):
        if os.path.islink(f"{rootfs}/{name}"):  # noqa: PTH114 - takes a tenth of pathlib's time
            raise InvalidArgumentError(f"/{name} of the image is a symbolic link: use an image with a folder there")


def kernel_mounts(
    paths: NamespacePaths, *, privileged: bool, gid_mappings: list[config.IDMapping]
) -> list[config.Mount]:
    """The mounts of proc, dev, devpts, mqueue, sysfs and cgroup.

    A user namespace must not mount the proc, sysfs or mqueue of a namespace that it does not own. Then the host's is
    bind mounted.
    """
    foreign = paths.user is not None
    writable = "rw" if privileged else "ro"
    bind = ["rbind", "rslave", "nosuid", "noexec", "nodev"]
    terminals = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]
    if not foreign or any(m.container_id <= TTY_GROUP < m.container_id + m.size for m in gid_mappings):
        terminals.append(f"gid={TTY_GROUP}")
    plain = ["nosuid", "noexec", "nodev"]
    return [
        config.Mount(destination="/proc", type="bind", source="/proc", options=bind)
        if foreign and paths.host_pid
        else config.Mount(destination="/proc", type="proc", source="proc", options=plain),
        DEFAULT_DEV,
        config.Mount(destination="/dev/pts", type="devpts", source="devpts", options=terminals),
        config.Mount(destination="/dev/mqueue", type="bind", source="/dev/mqueue", options=bind)
        if foreign and paths.ipc is None
        else config.Mount(destination="/dev/mqueue", type="mqueue", source="mqueue", options=plain),
        config.Mount(destination="/sys", type="bind", source="/sys", options=[*bind, writable])
        if foreign and paths.network is None
        else config.Mount(destination="/sys", type="sysfs", source="sysfs", options=[*plain, writable]),
        config.Mount(
            destination="/sys/fs/cgroup", type="cgroup", source="cgroup", options=[*plain, "relatime", writable]
        ),
    ]


def pod_mounts(files: SandboxFiles, *, own_ipc: bool, readonly_root: bool) -> list[config.Mount]:
    """The pod's shared memory, and its hosts, resolv.conf and hostname. The files are writable if the root is.

    A container in the node's IPC namespace shares the node's memory if the pod has none. The flags of the source mount
    are repeated, because crun removes the others.
    """
    mounts = []
    shm = files.shm if own_ipc or files.shm is not None else Path("/dev/shm")
    if shm is not None:
        flags = ["nosuid", "nodev", "noexec"] if own_ipc else ["nosuid", "nodev"]
        mounts.append(config.Mount(destination="/dev/shm", type="bind", source=str(shm), options=["bind", *flags]))
    for destination, source in (
        ("/etc/hosts", files.hosts),
        ("/etc/resolv.conf", files.resolv_conf),
        ("/etc/hostname", files.hostname),
    ):
        if source is not None:
            options = ["bind", "nosuid", "nodev", "noexec", *(["ro"] if readonly_root else [])]
            mounts.append(config.Mount(destination=destination, type="bind", source=str(source), options=options))
    return mounts
