"""Plugins that outlived the agent that called them: ended before what they did is undone."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Collection
from pathlib import Path

_WAIT_SECONDS = 2.0


def end_orphans(sandbox_ids: Collection[str]) -> int:
    """Kill every process that a plugin call for one of ``sandbox_ids`` left, and wait for their end; returns how many.

    Such processes carry the sandbox's id in their environment, those that plugins start too.
    """
    wanted = {f"CNI_CONTAINERID={sandbox_id}".encode() for sandbox_id in sandbox_ids}
    if not wanted:
        return 0
    ended = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if wanted.isdisjoint((entry / "environ").read_bytes().split(b"\0")):
                continue
            pidfd = os.pidfd_open(int(entry.name))
            try:
                # The process may have ended and its pid been taken since: look again now that it cannot change.
                if wanted.isdisjoint((entry / "environ").read_bytes().split(b"\0")):
                    continue
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                poll = select.poll()
                poll.register(pidfd, select.POLLIN)
                poll.poll(_WAIT_SECONDS * 1000)
                ended += 1
            finally:
                os.close(pidfd)
    return ended
