"""What OCI runtimes say, and what of it is about a program that cannot be run."""

from __future__ import annotations

import pytest

from runtime.oci.oci_runtime import cannot_run_program

PROGRAM = [
    "executable file `nothing` not found in $PATH: No such file or directory",
    "executable file `/bin/nothing` not found: No such file or directory",
    "open executable: Permission denied",
    "cannot find executable `x`",
    "exec container process (missing dynamic library?) `/app`: No such file or directory",
    "exec container process `/app`: Exec format error",
    'runc create failed: unable to start container process: exec: "x": executable file not found in $PATH',
    'runc create failed: unable to start container process: exec: "/x": stat /x: no such file or directory',
    'runc create failed: unable to start container process: exec: "/tmp": permission denied',
    "exec /app: exec format error",
    "exec /app: no such file or directory",
    "the path `/etc/passwd` exists but it is not executable: Operation not permitted",
    "the path `/etc` is not a regular file: Operation not permitted",
    "cannot open `/etc/passwd/x`: Not a directory",
]
OTHERS = [
    "openat2 `run`: No such file or directory",
    "mkdir `/etc/passwd/x`: Not a directory",
    'mount `/srv/exec: "x"` to `data`: Not a directory',
    "mkdir `proc/nothing`: No such file or directory",
    "chdir `/home/app`: Permission denied",
    "cannot stat `/srv/data`: No such file or directory",
    "runc create failed: unable to start container process: error during container init: error mounting "
    '"/srv" to rootfs at "/data": mount /srv:/data (via /proc/self/fd/6), flags: 0x5000: not a directory',
    'runc create failed: unable to start container process: chdir to cwd ("/w") set in config.json failed: permission '
    "denied",
    "write to `/sys/fs/cgroup/memory/x/memory.limit_in_bytes`: Permission denied",
    "sethostname: Is a directory",
    "cannot open `/srv/data`: Not a directory",
    "`/srv/data` is not a regular file",
]


@pytest.mark.parametrize("message", PROGRAM)
def test_a_program_that_cannot_be_run(message: str) -> None:
    assert cannot_run_program(message, "/etc/passwd/x")


@pytest.mark.parametrize("message", OTHERS)
def test_what_else_ends_with_the_same_words(message: str) -> None:
    assert not cannot_run_program(message, "/etc/passwd/x")
