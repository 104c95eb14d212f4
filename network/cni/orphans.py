"""Ends plugins that survived the agent that called them, before their work is undone."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Collection

from host.files import procfs

_WAIT_SECONDS = 2.0
_ENVIRONMENT_BYTES = 256 * 1024  # limits the memory: a process can make its environment very large


def end_orphans(sandbox_ids: Collection[str]) -> int:
    """Kill every process that a plugin call for one of ``sandbox_ids`` left, and wait until they ended.

    Returns their number. Such processes, and the processes that plugins start, have the sandbox's id in their
    environment.
    """
    wanted = {f"CNI_CONTAINERID={sandbox_id}".encode() for sandbox_id in sandbox_ids}
    if not wanted:
        return 0
    ended = 0
    for pid in procfs.all_pids():
        if pid == os.getpid() or wanted.isdisjoint(_environment(pid)):
            continue
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(pid)
            try:
                # The process may have ended and its pid may be reused: read again, now that the pidfd holds it.
                if wanted.isdisjoint(_environment(pid)):
                    continue
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                poll = select.poll()
                poll.register(pidfd, select.POLLIN)
                poll.poll(_WAIT_SECONDS * 1000)
                ended += 1
            finally:
                os.close(pidfd)
    return ended


def _environment(pid: int) -> list[bytes]:
    return procfs.read_bounded(f"/proc/{pid}/environ", _ENVIRONMENT_BYTES).split(b"\0")
