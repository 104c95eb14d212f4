"""The rights that the init of a shared PID namespace drops first, because containers of the pod may trace it.

It is in the pod's namespaces and not in the node's. It has a user without files, no capabilities, and a system call
filter. It cannot open a connection, receive a descriptor, mount, trace or send a signal.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
from functools import lru_cache

from host import libc
from host.seccomp import ALLOW, EQUAL, ERRNO, MASKED_EQUAL, Comparison, Rule, compile_filter
from runtime.layout import SandboxFolder

# The user of the pause containers of other agents.
_USER = 65535
_NUMBERS = {  # of setgroups, setresgid and setresuid, which the C library makes for all threads of a process
    "x86_64": (116, 119, 117),
    "aarch64": (159, 149, 147),
    "riscv64": (159, 149, 147),
    "ppc64le": (81, 169, 164),
    "s390x": (206, 210, 208),
}
_KINDS = {"net": libc.CLONE_NEWNET, "ipc": libc.CLONE_NEWIPC, "uts": libc.CLONE_NEWUTS}
# CLONE_NEWTIME, NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET: all flags that create a namespace.
_NEW_NAMESPACES = 0x7E020080
_MEMORY = 64 << 20  # bytes of address space
_PR_SET_CHILD_SUBREAPER = 36
_CLONE_FLAGS = 1 if os.uname().machine == "s390x" else 0  # the index of the argument with the flags

_OF_THREADS_AND_MEMORY = (
    *("brk", "mmap", "munmap", "mremap", "mprotect", "madvise", "futex", "rseq", "set_robust_list", "set_tid_address"),
    *("arch_prctl", "getrandom", "sched_yield", "exit", "exit_group", "gettid", "getpid", "clock_gettime", "uname"),
    *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "restart_syscall", "getrlimit", "ugetrlimit"),
)
_OF_STARTING_A_PROGRAM = (
    *("vfork", "execve", "setsid", "open", "openat", "close", "close_range", "dup2", "dup3", "fcntl"),
    *("read", "write", "writev", "readlink", "readlinkat", "fstat", "newfstatat", "statx"),
)
# catatonit reads signals from a descriptor and reaps children. Other versions may wait in another way.
_OF_AN_INIT = (
    *("signalfd", "signalfd4", "rt_sigtimedwait", "rt_sigsuspend", "pause", "poll", "ppoll", "wait4", "waitid"),
    *("getppid", "getpgid", "getpgrp", "getsid", "getuid", "geteuid", "getgid", "getegid", "setpgid", "nanosleep"),
    *("clock_nanosleep", "epoll_create1", "epoll_ctl", "epoll_wait", "epoll_pwait", "kill"),
)


def join_pod(folder: SandboxFolder) -> None:
    """Move the calling thread, a new one, into the pod's own network, IPC and UTS namespaces.

    Containers can read the addresses and sockets of the init's network namespace in the init's folder in /proc.
    """
    for kind, flag in _KINDS.items():
        pin = folder.pin(kind)
        if pin.exists():
            with pin.open("rb") as namespace:
                libc.setns(namespace.fileno(), flag)


def drop_rights() -> None:
    """Drop all rights of the calling thread that are not needed to start the init and to be it.

    The thread can do nothing else after that, such as wake the event loop. Raises OSError.
    """
    compiled = init_filter()
    setgroups, setresgid, setresuid = _NUMBERS[os.uname().machine]
    libc.syscall(setgroups, ctypes.c_size_t(0), None)
    libc.syscall(setresgid, *[ctypes.c_uint32(_USER)] * 3)
    libc.syscall(setresuid, *[ctypes.c_uint32(_USER)] * 3)
    libc.forbid_new_privileges()
    libc.install_seccomp_filter(compiled)


def limit(pid: int) -> None:
    """Limit the init with that pid, which the calling thread started, to little memory and no child process.

    It is in none of the pod's cgroups. A process that traces it could otherwise exceed the pod's limits with it. Raises
    OSError.
    """
    resource.prlimit(pid, resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.prlimit(pid, resource.RLIMIT_NPROC, (1, 1))
    resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))


@lru_cache(maxsize=1)
def init_filter() -> bytes:
    """The compiled filter. Raises UnavailableError if the node has no libseccomp."""
    return compile_filter(
        ERRNO | errno.EPERM,
        (
            Rule((*_OF_THREADS_AND_MEMORY, *_OF_STARTING_A_PROGRAM, *_OF_AN_INIT), ALLOW),
            Rule(("clone",), ALLOW, (Comparison(_CLONE_FLAGS, MASKED_EQUAL, _NEW_NAMESPACES, 0),)),
            Rule(("clone3",), ERRNO | errno.ENOSYS),  # its flags are in memory; the C library then uses clone
            Rule(("prctl",), ALLOW, (Comparison(0, EQUAL, _PR_SET_CHILD_SUBREAPER, 0),)),
            Rule(("prlimit64",), ALLOW),  # only for processes of the same user
        ),
    )
