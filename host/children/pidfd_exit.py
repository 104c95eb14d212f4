"""The exit of a process that is not a child, from a pidfd that was opened while it ran (ioctl PIDFD_GET_INFO)."""

from __future__ import annotations

import fcntl
import os
import struct

_PIDFD_GET_INFO = 0xC040FF0B
_INFO_EXIT = 1 << 3
_INFO = struct.Struct("=QQ11Ii")  # the first version of struct pidfd_info: mask, cgroup id, 11 ids, exit code


def ended_by_signal(pidfd: int) -> int | None:
    """The signal that killed the process of ``pidfd``, which its parent has reaped; 0 if no signal killed it.

    None if the kernel does not report it (before Linux 6.15), or if the process has not ended.
    """
    try:
        answer = fcntl.ioctl(pidfd, _PIDFD_GET_INFO, _INFO.pack(_INFO_EXIT, *[0] * 13))
    except OSError:
        return None
    mask, *_, status = _INFO.unpack(answer)
    if not mask & _INFO_EXIT:
        return None
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
