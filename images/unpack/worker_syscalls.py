"""The system calls that the confined unpack worker may make: those needed to read and write one layer.

Everything else fails with EPERM: the worker cannot start or signal a process, make a socket, open a file by handle,
mount or trace. libseccomp ignores names that a machine does not have.
"""

from __future__ import annotations

import errno
from functools import lru_cache

from host.seccomp import ALLOW, EQUAL, ERRNO, MASKED_EQUAL, Comparison, Rule, compile_filter

_PROT_EXEC = 4
_DESCRIPTOR_FLAGS = (1, 2, 3)  # F_GETFD, F_SETFD, F_GETFL of fcntl(2)

_READING_AND_WRITING = (
    *("read", "readv", "pread64", "write", "writev", "pwrite64", "lseek", "_llseek", "close", "close_range"),
    *("open", "openat", "openat2", "getdents64", "ftruncate", "ftruncate64", "truncate", "truncate64", "fallocate"),
    *("stat", "lstat", "fstat", "stat64", "lstat64", "fstat64", "newfstatat", "fstatat64", "statx", "getcwd"),
    *("access", "faccessat", "faccessat2", "readlink", "readlinkat", "chdir", "fchdir", "umask"),
    *("statfs", "fstatfs", "statfs64", "fstatfs64"),
)
_CHANGING_NAMES = (
    *("mkdir", "mkdirat", "link", "linkat", "symlink", "symlinkat", "unlink", "unlinkat", "rmdir"),
    *("chown", "lchown", "fchown", "fchownat", "chown32", "lchown32", "fchown32"),
    *("chmod", "fchmod", "fchmodat", "fchmodat2", "utimensat", "utimensat_time64", "futimesat", "utime", "utimes"),
    *("setxattr", "lsetxattr", "fsetxattr", "getxattr", "lgetxattr", "fgetxattr"),
)
_OF_THE_PROCESS_ITSELF = (
    *("brk", "munmap", "mremap", "madvise", "futex", "futex_time64", "rseq", "set_robust_list", "getrandom"),
    *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "sigreturn", "restart_syscall"),
    *("clock_gettime", "clock_gettime64", "gettimeofday", "sched_yield", "getpid", "gettid", "getuid", "geteuid"),
    *("getgid", "getegid", "getrusage", "uname", "wait4", "exit", "exit_group"),
)


@lru_cache(maxsize=1)
def worker_filter() -> bytes:
    """The compiled filter. Raises UnavailableError if the node has no libseccomp."""
    return compile_filter(
        ERRNO | errno.EPERM,
        (
            Rule((*_READING_AND_WRITING, *_CHANGING_NAMES, *_OF_THE_PROCESS_ITSELF), ALLOW),
            Rule(("mmap", "mmap2", "mprotect"), ALLOW, (Comparison(2, MASKED_EQUAL, _PROT_EXEC, 0),)),
            *(Rule(("fcntl", "fcntl64"), ALLOW, (Comparison(1, EQUAL, command, 0),)) for command in _DESCRIPTOR_FLAGS),
            # Device number 0 is overlayfs's whiteout, or a fifo, which has no number.
            Rule(("mknod",), ALLOW, (Comparison(2, EQUAL, 0, 0),)),
            Rule(("mknodat",), ALLOW, (Comparison(3, EQUAL, 0, 0),)),
        ),
    )
