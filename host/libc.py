"""System calls that Python does not offer. Each releases the GIL, and raises ``OSError`` that names its object."""

from __future__ import annotations

import ctypes
import errno
import os
import sys

TYPE_CHECKING = False  # for type checkers; a worker that must start quickly imports this, and importing typing is slow
if TYPE_CHECKING:
    from typing import Any

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_FS = 0x00000200

_M_ARENA_MAX = -8
_KEYCTL = {"x86_64": 250, "ppc64le": 271, "s390x": 280}.get(os.uname().machine, 219)
_JOIN_SESSION_KEYRING = 1

_FALLOC_FL_KEEP_SIZE = 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.setns.argtypes = (ctypes.c_int, ctypes.c_int)
_libc.unshare.argtypes = (ctypes.c_int,)
_libc.prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)
_libc.sethostname.argtypes = (ctypes.c_char_p, ctypes.c_size_t)
_libc.syscall.restype = ctypes.c_long


def _check(result: int, *names: object) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), *names)
    return result


def mount(source: str, target: str, filesystem: str, flags: int, data: str) -> None:
    """mount(2)."""
    encoded = [os.fsencode(text) for text in (source, target, filesystem, data)]
    _check(_libc.mount(*encoded[:3], flags, encoded[3]), target)


def umount(target: str, flags: int) -> None:
    """umount2(2)."""
    _check(_libc.umount2(os.fsencode(target), flags), target)


def setns(descriptor: int, kind: int) -> None:
    """Move the calling thread into the namespace of ``descriptor`` (setns(2))."""
    _check(_libc.setns(descriptor, kind), f"namespace descriptor {descriptor}")


def unshare(flags: int) -> None:
    """Move the calling thread to new namespaces (unshare(2)). Raises OSError: EUSERS if their limit is reached."""
    try:
        _check(_libc.unshare(flags), f"flags {flags:#x}")
    except OSError as error:
        if error.errno != errno.ENOSPC:  # here ENOSPC means the limit of namespaces
            raise
        message = "the node has no more namespaces: raise the limits in /proc/sys/user (user.max_*_namespaces)"
        raise OSError(errno.EUSERS, message) from error


def sethostname(name: str) -> None:
    """Set the host name in the calling thread's UTS namespace."""
    encoded = os.fsencode(name)
    _check(_libc.sethostname(encoded, len(encoded)), name)


def reserve_space(descriptor: int, size: int) -> None:
    """Reserve disk space for the first ``size`` bytes of a file without changing its size. Raises OSError."""
    _check(_libc.fallocate(descriptor, _FALLOC_FL_KEEP_SIZE, 0, size), f"descriptor {descriptor}")


def set_file_user(uid: int, gid: int) -> None:
    """Give the calling thread only a user's rights on files (setfsuid(2), setfsgid(2))."""
    _libc.setfsgid(gid)
    _libc.setfsuid(uid)  # last, because it drops the capabilities that override permissions
    if _libc.setfsuid(-1) != uid or _libc.setfsgid(-1) != gid:
        raise PermissionError(f"the thread cannot work as user {uid} and group {gid}")


def limit_heap_arenas(count: int) -> None:
    """Make all threads allocate from ``count`` heaps (mallopt(3)), if the C library is glibc.

    Otherwise each thread gets its own heap, which never becomes smaller.
    """
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(_M_ARENA_MAX, count)


def set_child_subreaper() -> None:
    """Make this process the parent of its orphaned descendants (prctl PR_SET_CHILD_SUBREAPER)."""
    _check(_libc.prctl(36, 1, 0, 0, 0), "child subreaper")


def die_with_parent() -> None:
    """Make the kernel kill this process when the thread that started it ends (prctl PR_SET_PDEATHSIG)."""
    _check(_libc.prctl(1, 9, 0, 0, 0), "parent death signal")


def forbid_new_privileges() -> None:
    """Programs that this process executes get no more rights than it has (prctl PR_SET_NO_NEW_PRIVS)."""
    _check(_libc.prctl(38, 1, 0, 0, 0), "no_new_privs")


def install_seccomp_filter(compiled: bytes) -> None:
    """Install a filter of host/seccomp.py in this process permanently. The process must have no_new_privs."""
    code = ctypes.create_string_buffer(compiled, len(compiled))
    program = _FilterProgram(len(compiled) // 8, ctypes.addressof(code))
    _check(_libc.prctl(22, 2, ctypes.addressof(program), 0, 0), "seccomp filter")


class _FilterProgram(ctypes.Structure):
    """struct sock_fprog of seccomp(2)."""

    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))


def set_capabilities(kept: int) -> None:
    """Make ``kept`` this process's effective and permitted capabilities; none is inheritable (capset(2))."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    low, high = kept & 0xFFFFFFFF, kept >> 32
    data = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)
    _check(_libc.capset(header, data), f"capabilities {kept:#x}")


def syscall(number: int, *arguments: Any) -> int:
    """Make any system call by number (syscall(2))."""
    return _check(_libc.syscall(ctypes.c_long(number), *arguments), f"system call {number}")


_STATFS_TYPE_BYTES = 4 if os.uname().machine == "s390x" else ctypes.sizeof(ctypes.c_long)
_PROC_SUPER_MAGIC = 0x9FA0
_SYSFS_MAGIC = 0x62656572


def is_kernel_filesystem(descriptor: int) -> bool:
    """Whether a descriptor is on a proc(5) or sysfs(5) file system (fstatfs(2)). False for a negative number."""
    if descriptor < 0:
        return False
    buffer = ctypes.create_string_buffer(256)  # struct statfs is smaller, and begins with f_type
    _check(_libc.fstatfs(descriptor, buffer), f"descriptor {descriptor}")
    kind = int.from_bytes(buffer.raw[:_STATFS_TYPE_BYTES], sys.byteorder)
    return kind in (_PROC_SUPER_MAGIC, _SYSFS_MAGIC)


RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10
_SYS_OPENAT2 = 437  # the same on every architecture
_OPENAT2_ATTEMPTS = 64


def openat2(folder: int, path: bytes, flags: int, resolve: int) -> int:
    """Open ``path``, which starts at the open ``folder``, with the restrictions ``resolve`` (openat2(2)).

    Raises OSError. For EAGAIN it tries again: an object was renamed or mounted meanwhile, anywhere on the node.
    """
    how = (ctypes.c_uint64 * 3)(flags | os.O_CLOEXEC, 0, resolve)
    size = ctypes.c_size_t(ctypes.sizeof(how))
    number = ctypes.c_long(_SYS_OPENAT2)
    for _ in range(_OPENAT2_ATTEMPTS - 1):
        descriptor = int(_libc.syscall(number, ctypes.c_int(folder), path, how, size))
        if descriptor >= 0 or ctypes.get_errno() != errno.EAGAIN:
            return _check(descriptor, path)
    return _check(_libc.syscall(number, ctypes.c_int(folder), path, how, size), path)


class _MountAttributes(ctypes.Structure):
    """struct mount_attr of mount_setattr(2)."""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


_OPEN_TREE = 428
_MOVE_MOUNT = 429
_MOUNT_SETATTR = 442
_AT_EMPTY_PATH = 0x1000
_AT_RECURSIVE = 0x8000
_AT_SYMLINK_NOFOLLOW = 0x100
_AT_FDCWD = -100
_MOVE_MOUNT_F_EMPTY_PATH = 4
_OPEN_TREE_CLONE = 1
_MOUNT_ATTR_IDMAP = 0x00100000


def clone_tree(path: str, *, recursive: bool = False) -> int:
    """A descriptor of a new, detached bind mount of ``path``, which must not be a symbolic link (open_tree(2)).

    ``recursive``: with the mounts below it.
    """
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_SYMLINK_NOFOLLOW | (_AT_RECURSIVE if recursive else 0)
    return _check(
        _libc.syscall(ctypes.c_long(_OPEN_TREE), ctypes.c_int(_AT_FDCWD), os.fsencode(path), ctypes.c_uint(flags)), path
    )


def map_ids(mount_descriptor: int, user_namespace: int, name: str) -> None:
    """Map the owners of a detached mount by a user namespace (mount_setattr(2)).

    ``name`` is the mounted folder, for the error.
    """
    _set_attributes(
        mount_descriptor,
        _MountAttributes(attr_set=_MOUNT_ATTR_IDMAP, userns_fd=user_namespace),
        _AT_EMPTY_PATH,
        name,
    )


def set_propagation(mount_descriptor: int, propagation: int, name: str) -> None:
    """Make a detached mount and all mounts below it private or slave (MS_PRIVATE, MS_SLAVE; mount_setattr(2))."""
    attributes = _MountAttributes(propagation=propagation)
    _set_attributes(mount_descriptor, attributes, _AT_EMPTY_PATH | _AT_RECURSIVE, name)


def _set_attributes(mount_descriptor: int, attributes: _MountAttributes, flags: int, name: str) -> None:
    _check(
        _libc.syscall(
            ctypes.c_long(_MOUNT_SETATTR),
            ctypes.c_int(mount_descriptor),
            b"",
            ctypes.c_uint(flags),
            ctypes.byref(attributes),
            ctypes.c_size_t(ctypes.sizeof(attributes)),
        ),
        name,
    )


def attach_mount(mount_descriptor: int, target: str) -> None:
    """Attach a detached mount to the folder ``target`` (move_mount(2))."""
    _check(
        _libc.syscall(
            ctypes.c_long(_MOVE_MOUNT),
            ctypes.c_int(mount_descriptor),
            b"",
            ctypes.c_int(_AT_FDCWD),
            os.fsencode(target),
            ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH),
        ),
        target,
    )


def leave_session_keyring() -> None:
    """Give the calling thread, and what it starts later, an empty session keyring (keyrings(7)).

    crun executes commands in containers with its own session keyring. Otherwise that would have the keys of the session
    that started the agent. A kernel without keyrings is no error.
    """
    try:
        syscall(_KEYCTL, ctypes.c_int(_JOIN_SESSION_KEYRING), None)
    except OSError:
        return
