"""Plugins that outlived the agent that called them: ended before what they did is undone."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Collection

from host.files import procfs

_WAIT_SECONDS = 2.0
_ENVIRONMENT_BYTES = 256 * 1024  # a process can say that its own is as large as its memory


def end_orphans(sandbox_ids: Collection[str]) -> int:
    """Kill every process that a plugin call for one of ``sandbox_ids`` left, and wait for their end; returns how many.

    Such processes carry the sandbox's id in their environment, those that plugins start too.
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
                # The process may have ended and its pid been taken since: look again now that it cannot change.
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
