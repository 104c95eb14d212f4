"""The namespaces of a sandbox: a thread unshares them, bind mounts pin them, and they end when these are unmounted."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from host import libc
from host.errors import InvalidArgumentError, PodkeelError
from host.files import mounts
from host.files.removal import remove_tree
from runtime.layout import SandboxFolder
from runtime.namespaces.user import Mappings, make_pins, make_private, root_of
from runtime.specgen.sysctls import is_of_link, sysctl_path

_FLAGS = {"net": libc.CLONE_NEWNET, "ipc": libc.CLONE_NEWIPC, "uts": libc.CLONE_NEWUTS}


@dataclass(frozen=True, slots=True)
class NamespacePlan:
    """The namespaces of a sandbox: ``kinds`` out of net, ipc and uts. Sysctls are set inside them. The sysctls of
    network interfaces are set by ``set_link_sysctls``, once the interfaces exist.

    With ``mappings`` of uids and gids it also gets a user namespace, which owns the others. ``mount_label`` is the
    SELinux label of /dev/shm, or empty.
    """

    kinds: tuple[str, ...]
    hostname: str
    sysctls: Mapping[str, str]
    shm_size: int
    mappings: Mappings | None = None
    mount_label: str = ""

    @property
    def link_sysctls(self) -> dict[str, str]:
        """The sysctls of network interfaces."""
        return {name: value for name, value in self.sysctls.items() if is_of_link(name)}


def make_namespaces(folder: SandboxFolder, plan: NamespacePlan) -> None:
    """Create and pin the namespaces and /dev/shm of a sandbox.

    Runs in a new thread, which stays inside the new namespaces. Raises InvalidArgumentError if the kernel refuses a
    sysctl.
    """
    make_private(folder.path, plan.mappings)
    if plan.mappings is not None:
        make_pins(folder, plan.kinds, plan.mappings)
        _enter(folder, plan.kinds)
    else:
        _unshare_and_pin(folder, plan.kinds)
    if "uts" in plan.kinds and plan.hostname:
        libc.sethostname(plan.hostname)
    for name, value in plan.sysctls.items():
        if not is_of_link(name):
            _set_sysctl(name, value)
    if "ipc" in plan.kinds:
        folder.shm.mkdir(mode=0o1777)
        flags = mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC
        uid, gid = root_of(plan.mappings) if plan.mappings is not None else (0, 0)
        options = f"mode=1777,size={plan.shm_size},uid={uid},gid={gid}{mounts.context_option(plan.mount_label)}"
        libc.mount("shm", str(folder.shm), "tmpfs", flags, options)


def set_link_sysctls(folder: SandboxFolder, plan: NamespacePlan) -> None:
    """Set the sysctls of network interfaces. Runs in a new thread, which stays inside. Raises InvalidArgumentError."""
    _enter(folder, ("net",))
    for name, value in plan.link_sysctls.items():
        _set_sysctl(name, value)


def _unshare_and_pin(folder: SandboxFolder, kinds: Sequence[str]) -> None:
    flags = 0
    for kind in kinds:
        flags |= _FLAGS[kind]
    folder.namespaces.mkdir(mode=0o711)
    if flags:
        libc.unshare(flags)
    for kind in kinds:
        pin = folder.pin(kind)
        os.close(os.open(pin, os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC, 0o444))
        mounts.bind(f"/proc/thread-self/ns/{kind}", pin)


def _enter(folder: SandboxFolder, kinds: Sequence[str]) -> None:
    for kind in kinds:
        with folder.pin(kind).open("rb") as pin:
            libc.setns(pin.fileno(), _FLAGS[kind])


def drop_namespaces(folder: SandboxFolder) -> None:
    """Unmount everything below a sandbox's folder and delete the folder. A missing one is no error.

    Raises PodkeelError if it cannot be deleted.
    """
    for kind in ("net", "ipc", "uts", "pid", "user"):
        mounts.unmount(folder.pin(kind), lazy=True)
    mounts.unmount(folder.shm, lazy=True)
    mounts.unmount(folder.files, lazy=True)
    remove_path(folder.path)


def pins_hold(folder: SandboxFolder, kinds: tuple[str, ...]) -> bool:
    """Whether every namespace in ``kinds`` is still pinned (a pin is a mount of the kernel's nsfs)."""
    return all(_is_namespace(folder.pin(kind)) for kind in kinds)


def _is_namespace(path: Path) -> bool:
    try:
        device = path.stat().st_dev
    except OSError:
        return False
    return device == Path("/proc/self/ns/net").stat().st_dev


def _set_sysctl(name: str, value: str) -> None:
    path = Path(sysctl_path(name))
    try:
        with path.open("w") as file:
            file.write(value)
    except OSError as error:
        reason = "this kernel has no such sysctl" if error.errno == errno.ENOENT else error.strerror
        raise InvalidArgumentError(f"sysctl {name}={value}: {reason}") from error


def remove_path(path: Path) -> None:
    """Delete a folder with its content, or a file. A missing one is no error. Raises PodkeelError."""
    if left := remove_tree(path):
        raise PodkeelError(left[0])
