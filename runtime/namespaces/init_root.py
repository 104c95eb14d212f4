"""The root of the inits of shared PID namespaces: a read-only tmpfs with their program and a separate null device.

Containers of a pod can reach it through /proc/1/root and /proc/1/exe, and OCI runtimes do so with all capabilities. The
file system itself is read-only, so no process can write, rename, chmod or chown anything in it.
"""

from __future__ import annotations

import os
import shutil
import threading
from functools import partial
from pathlib import Path

from host import libc
from host.concurrency.thread_starting import run_in_new_thread
from host.files import mounts
from host.files.null_devices import make_null_device

PROGRAM = "/catatonit"

_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}[os.uname().machine]
# Its temporary mount point, in mount namespaces without other processes. Every node has that folder.
_PLACE = "/dev"
_SPARE_BYTES = 65536

_Version = tuple[int, int, int, int]


class InitRoot:
    """A mount namespace that has only this root, with a copy of ``program``. It is created when first entered."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._version: _Version | None = None
        self._namespace = -1

    def enter(self, program: str) -> None:
        """Move the calling thread, a new one, into it permanently. There PROGRAM is ``program``."""
        libc.unshare(libc.CLONE_FS)
        libc.setns(self._made(program), libc.CLONE_NEWNS)

    def clone(self, program: str) -> int:
        """A detached mount of the copy of ``program``. The calling thread, a new one, stays in that namespace."""
        self.enter(program)
        return libc.clone_tree(PROGRAM)

    def _made(self, program: str) -> int:
        with self._lock:
            status = Path(program).stat()
            version = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            if version != self._version:
                namespace = run_in_new_thread(partial(_make, program), name="init-root")
                if self._namespace >= 0:
                    os.close(self._namespace)
                self._namespace, self._version = namespace, version
            return self._namespace


INIT_ROOT = InitRoot()
"""The root of this process, for all of its pods."""


def _make(program: str) -> int:
    """A descriptor of the new mount namespace. The calling thread stays in it."""
    mounts.enter_new_mount_namespace()
    namespace = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = Path(program).stat().st_size + _SPARE_BYTES
        _mount(size)
        copy = Path(_PLACE + PROGRAM)
        shutil.copyfile(program, copy)
        copy.chmod(0o711)  # a process inside a user namespace cannot inspect a program that it cannot read
        _become_root()
    except BaseException:
        os.close(namespace)
        raise
    return namespace


def become_root_of(namespace: int, program: int, name: str) -> None:
    """Make a pod's init root the root of the mount namespace of descriptor ``namespace``, and of all processes in it.

    ``program`` is a detached mount of its program, which becomes ``/name``. The calling thread must be a new one that
    shares its root with no other. It stays in that namespace.
    """
    libc.setns(namespace, libc.CLONE_NEWNS)
    _mount(_SPARE_BYTES)
    (Path(_PLACE) / name).touch()
    libc.attach_mount(program, f"{_PLACE}/{name}")
    _become_root()


def _mount(size: int) -> None:
    libc.mount("init", _PLACE, "tmpfs", mounts.MS_NOSUID, f"mode=0711,size={size},nr_inodes=8")


def _become_root() -> None:
    null = Path(_PLACE, "dev", "null")
    null.parent.mkdir()
    null.parent.chmod(0o711)  # independent of the agent's umask, because the init's user does not own it
    make_null_device(null)
    # The whole file system, not only this mount: the latter can be undone by mounting it again.
    mounts.make_file_system_read_only(_PLACE, mounts.MS_NOSUID)
    os.chdir(_PLACE)
    # pivot_root(".", ".") puts the old root on top of the new one, and it is unmounted from there (pivot_root(2)).
    libc.syscall(_SYS_PIVOT_ROOT, b".", b".")
    libc.umount(".", mounts.MNT_DETACH)
