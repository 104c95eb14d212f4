"""Drops rights of the unpack worker before it reads a layer, so that code executed by a layer reaches only the layer.

The worker is two processes. The outer one waits and reports how the inner one ended. The inner one reads the layer: it
is the first process of a new PID namespace, with empty network, IPC and mount namespaces and the layer's folder as its
root. It has only the capabilities for writing other users' files, a seccomp filter, and limits.

References: user_namespaces(7), pid_namespaces(7), capabilities(7), seccomp(2), getrlimit(2).
"""

from __future__ import annotations

import errno
import os
import resource

from host import libc

TYPE_CHECKING = False  # type checkers treat this name as true; importing typing is slow
if TYPE_CHECKING:
    from collections.abc import Callable

    from images.unpack.writing.helper_process import HelperProcess

OPEN_FILES = 64
_LIFELINE = 3  # stays open, so that the agent sees when this process has ended
_MAX_DESCRIPTORS = 1 << 16
_NICENESS = 5
_OOM_SCORE = 1000

# chown, dac_override, fowner, fsetid, setfcap. Not dac_read_search: it can open any file of the file system by handle.
_KEPT_CAPABILITIES = sum(1 << number for number in (0, 1, 3, 4, 31))
_NAMESPACES = libc.CLONE_NEWNS | libc.CLONE_NEWNET | libc.CLONE_NEWIPC
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 32, 1 << 12, 1 << 14, 1 << 18
_MNT_DETACH = 2
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}


class Limits:
    """The limits of one worker: bytes of memory, seconds of processor time, bytes of one file."""

    __slots__ = ("file_bytes", "memory_bytes", "seconds")

    def __init__(self, memory_bytes: int, seconds: int, file_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self.seconds = seconds
        self.file_bytes = file_bytes


class Ended:
    """How the inner process ended: its exit status, or minus the signal, and the processor seconds it used."""

    __slots__ = ("seconds", "status")

    def __init__(self, status: int, seconds: float) -> None:
        self.status = status
        self.seconds = seconds


def run_confined(
    folder: str,
    seccomp_filter: bytes,
    limits: Limits,
    work: Callable[[], None],
    failed: Callable[[OSError], None],
    *,
    helper: HelperProcess | None,
) -> Ended:
    """Call ``work`` in a process that has only ``folder`` as its root, and standard input, output and error.

    That process forks ``helper``, which has the same root, rights, filter and limits, and ends with it. If the process
    cannot be confined, it calls ``failed`` instead. Closes standard input of the calling process, so that the writer of
    the pipe gets an error once the inner process stops reading. Raises OSError.
    """
    _lower_priority()
    libc.unshare(libc.CLONE_NEWPID)
    inner = os.fork()
    if inner == 0:
        try:
            libc.die_with_parent()
            try:
                is_helper = _confine(folder, seccomp_filter, limits, helper)
            except OSError as error:
                failed(error)
            else:
                if is_helper and helper is not None:
                    helper.serve()
                else:
                    work()
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}".encode("utf-8", "backslashreplace"))
            os._exit(1)
        os._exit(0)  # without Python's clean-up, which is not needed
    os.close(0)
    _, status, usage = os.wait4(inner, 0)
    return Ended(os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime)


def _confine(folder: str, seccomp_filter: bytes, limits: Limits, helper: HelperProcess | None) -> bool:
    """True in the helper."""
    held = _held_capabilities()
    libc.unshare(_NAMESPACES)
    _enter(folder)
    os.closerange(_LIFELINE + 1, _MAX_DESCRIPTORS)
    for kind, wanted in (
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_CPU, limits.seconds),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (limit, limit))
    os.umask(0)
    is_helper = helper is not None and helper.fork()
    libc.set_capabilities(held & _KEPT_CAPABILITIES)
    libc.forbid_new_privileges()
    libc.install_seccomp_filter(seccomp_filter)
    return is_helper


def _enter(folder: str) -> None:
    """Make ``folder`` the root of this process, so that nothing else of the host is visible."""
    libc.mount("", "/", "", _MS_REC | _MS_PRIVATE, "")
    libc.mount(folder, folder, "", _MS_BIND, "")
    os.chdir(folder)
    safe = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    libc.mount("", ".", "", _MS_REMOUNT | _MS_BIND | safe, "")
    number = _SYS_PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, f"no pivot_root number known for {os.uname().machine}")
    libc.syscall(number, b".", b".")
    libc.umount(".", _MNT_DETACH)
    os.chdir("/")


def _lower_priority() -> None:
    """Lower this process's priority, and let the kernel kill it before containers if memory is short."""
    os.nice(_NICENESS)
    for path, value in (("/proc/self/autogroup", _NICENESS), ("/proc/self/oom_score_adj", _OOM_SCORE)):
        try:
            with open(path, "wb", 0) as file:
                file.write(b"%d" % value)
        except OSError:  # not every kernel has autogroups, or allows frequent changes: sched(7), "autogroup feature"
            continue


def _held_capabilities() -> int:
    """The permitted capabilities of this process."""
    with open("/proc/self/status", "rb") as status:
        return next(int(line.split()[1], 16) for line in status if line.startswith(b"CapPrm:"))
