"""Mounts, unmounts, and reads the mount table."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from host import libc
from host.errors import UnsupportedError

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

_MAX_SECONDS_BUSY = 10.0
_OCTAL = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One line of mountinfo (proc(5)): mount point, source, options and propagation."""

    mount_id: int
    parent_id: int
    root: str
    target: str
    options: frozenset[str]
    propagation: tuple[str, ...]
    filesystem: str
    source: str
    super_options: str

    @property
    def shared(self) -> bool:
        """Whether mounts that are made below it propagate to its peers."""
        return any(field.startswith("shared:") for field in self.propagation)

    @property
    def slave(self) -> bool:
        """Whether it receives mounts from a master."""
        return any(field.startswith("master:") for field in self.propagation)


def enter_new_mount_namespace() -> None:
    """Move the calling thread, which must be a new one, to a new mount namespace that other threads do not see."""
    libc.unshare(libc.CLONE_NEWNS)
    libc.mount("", "/", "", MS_REC | MS_PRIVATE, "")


def make_file_system_read_only(target: str, flags: int) -> None:
    """Remount the whole file system at ``target`` read-only, with ``flags``, for all of its mounts.

    Blocks. Raises OSError.

    The kernel refuses while any process has a file open for writing. A child that another thread is starting has all
    descriptors until its execve, also those that were closed since. So this function waits for it.
    """
    deadline = time.monotonic() + _MAX_SECONDS_BUSY
    while True:
        try:
            libc.mount("", target, "", MS_REMOUNT | MS_RDONLY | flags, "")
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.001)
        else:
            return


def mount_table(path: str = "/proc/self/mountinfo") -> Iterator[MountEntry]:
    """All mounts of this process's mount namespace, in the kernel's order."""
    with open(path, "rb") as table:
        return parse_mount_table(table.read())


def parse_mount_table(content: bytes) -> Iterator[MountEntry]:
    """The entries of a mountinfo table (proc_pid_mountinfo(5)). Malformed lines are skipped.

    Paths are decoded like names of files: bytes that are not UTF-8 become surrogates (os.fsdecode). The kernel escapes
    only space, tab, newline and backslash. So single spaces separate the fields, a field may be empty, and every other
    byte belongs to a name.
    """
    for line in content.split(b"\n"):
        entry = _entry(line.split(b" "))
        if entry is not None:
            yield entry


def _entry(fields: list[bytes]) -> MountEntry | None:
    try:
        dash = fields.index(b"-", 6)
        return MountEntry(
            int(fields[0]),
            int(fields[1]),
            _unescape(fields[3]),
            _unescape(fields[4]),
            frozenset(os.fsdecode(fields[5]).split(",")),
            tuple(os.fsdecode(field) for field in fields[6:dash]),
            _unescape(fields[dash + 1]),
            _unescape(fields[dash + 2]),
            os.fsdecode(fields[dash + 3]) if len(fields) > dash + 3 else "",
        )
    except (ValueError, IndexError):
        return None


def mounts_below(folder: str | Path) -> list[str]:
    """Targets of the mounts at or below ``folder``, deepest and newest first: the order in which to unmount them."""
    prefix = str(folder).rstrip("/")
    return [e.target for e in mount_table() if e.target == prefix or e.target.startswith(prefix + "/")][::-1]


def mount_holding(path: str) -> MountEntry:
    """The mount that ``path`` is on. The path must not have symbolic links."""
    best: MountEntry | None = None
    for entry in mount_table():
        target = entry.target.rstrip("/")
        inside = path == entry.target or path.startswith(target + "/")
        if inside and (best is None or len(target) >= len(best.target.rstrip("/"))):
            best = entry
    if best is None:
        raise FileNotFoundError(errno.ENOENT, "no mount holds it", path)
    return best


def mount_id(descriptor: int) -> int:
    """The kernel's id of the mount that an open file is on (proc(5), fdinfo)."""
    with open(f"/proc/self/fdinfo/{descriptor}", "rb") as info:
        return next(int(line[7:]) for line in info if line.startswith(b"mnt_id:"))


def bind(source: str | Path, target: str | Path, *, recursive: bool = False) -> None:
    """Bind mount ``source`` onto the existing ``target``."""
    libc.mount(str(source), str(target), "", MS_BIND | (MS_REC if recursive else 0), "")


def bind_with_ids(
    source: str | Path,
    target: str | Path,
    user_namespace: str | Path,
    *,
    slave_tree: bool | None = None,
    step: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Bind mount ``source`` onto the existing ``target``. Its owners are mapped by the user namespace pinned there.

    With ``slave_tree`` None only ``source`` is mounted. Otherwise mounts below it are included, with their own owners;
    if it is true, also mounts that are made there later. Unmounting ``target`` never changes ``source``. The mount is
    attached inside a ``step``. Raises UnsupportedError if the file system or the kernel has no idmapped mounts.
    """
    with open(user_namespace, "rb") as pin:
        descriptor = libc.clone_tree(str(source), recursive=slave_tree is not None)
        try:
            libc.set_propagation(descriptor, MS_SLAVE if slave_tree else MS_PRIVATE, str(source))
            libc.map_ids(descriptor, pin.fileno(), str(source))
            with step():
                libc.attach_mount(descriptor, str(target))
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise UnsupportedError(
                    f"{source} cannot be mounted with mapped ids: its file system or the kernel does not support it"
                ) from error
            raise
        finally:
            os.close(descriptor)


def unmount(target: str | Path, *, lazy: bool = False) -> bool:
    """Unmount ``target``. False if nothing is mounted there or it does not exist. A busy mount is detached lazily."""
    flags = UMOUNT_NOFOLLOW | (MNT_DETACH if lazy else 0)
    try:
        libc.umount(str(target), flags)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):
            return False
        if error.errno == errno.EBUSY and not lazy:
            return unmount(target, lazy=True)
        raise
    return True


def _unescape(field: bytes) -> str:
    if b"\\" in field:
        field = _OCTAL.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), field)
    return os.fsdecode(field)


def context_option(label: str) -> str:
    """The mount option that gives all files of a mount the SELinux label ``label``; empty without a label."""
    return f',context="{label}"' if label else ""
