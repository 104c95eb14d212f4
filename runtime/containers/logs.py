"""Having the logs of containers written to new files, after the old ones were renamed."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from host.concurrency.threads import acquired, in_fresh_thread
from host.errors import PodkeelError, WrongStateError
from host.files.inotify import wait_for_entries
from host.processes import ProcessName
from runtime.logs import LogFile, LogLink, append_from_now_on, has_open
from runtime.oci.conmon import Monitors
from runtime.state.container import Container
from runtime.state.state import State

REOPEN_SECONDS = 5.0
# How long conmon takes at most, while it runs, from reading that it is to open its log to opening it.
_TAKING_SECONDS = 0.5


class ContainerLogs:
    """Reopens the logs of containers that run."""

    def __init__(self, state: State, monitors: Monitors) -> None:
        self._state = state
        self._monitors = monitors

    async def reopen(self, container_id: str) -> None:
        """Have the log written to a new file after the old one was renamed; nothing if it was not.

        After any failure the old log is still used.

        Raises:
            WrongStateError: the container does not run, has no log, or another file with content took the log's place.
            InvalidArgumentError: the log's place is taken, or a link leads from it out of the pod's log folder.
            LimitError: the file system is full.
        """
        container = self._state.running_container(container_id)
        if container.log is None:
            raise WrongStateError(f"{container.title} has no log: its log_path is empty")
        async with container.log_lock:
            descriptor = await acquired(in_fresh_thread, container.log.open, os.close)
            try:
                await self._write_log_to(container, descriptor)
            finally:
                os.close(descriptor)

    async def _write_log_to(self, container: Container, descriptor: int) -> None:
        monitor, log = container.record.monitor, container.log
        assert log is not None
        if monitor is None:
            raise WrongStateError(f"{container.title}: its conmon was killed: nothing writes its log any more")
        if await in_fresh_thread(has_open, monitor, descriptor):
            await in_fresh_thread(append_from_now_on, monitor, descriptor)
            return
        size = (await in_fresh_thread(os.fstat, descriptor)).st_size
        if size:
            raise WrongStateError(f"log {log.path} is another file now, with {size} bytes: rename it first")
        try:
            opened = await self._open_next(container, monitor, log, descriptor)
        except OSError as error:
            await in_fresh_thread(log.path.unlink, missing_ok=True)
            raise PodkeelError(f"{container.title}: its conmon cannot be reached: {error.strerror}") from error
        if not opened:
            raise PodkeelError(f"{container.title}: its conmon did not open {log.path} within {REOPEN_SECONDS:g} s")

    async def _open_next(self, container: Container, monitor: ProcessName, log: LogFile, descriptor: int) -> bool:
        """Have conmon open the new, empty file of ``descriptor``; whether it does so in time."""
        reopen = self._monitors.reopen_log
        link = LogLink(container.folder.path)
        if not link.is_used:  # its conmon was started by an older version: it knows the path itself
            next_log = LogFile(log.folder, Path(f"{log.path}.tmp"))
            descriptor = await acquired(in_fresh_thread, next_log.open, os.close)
            try:
                reopen(container.id)
                opened = await wait_for_entries(log.path.parent, lambda: has_open(monitor, descriptor), REOPEN_SECONDS)
                await in_fresh_thread(append_from_now_on, monitor, descriptor)
            finally:
                os.close(descriptor)
            return opened
        monitors, folder = self._monitors, link.path.parent
        told = link.waiting() is not None and monitors.has_unread(container.id)
        if link.waiting() is not None and not told:  # it is about to open it, or the agent that would ask it died
            await wait_for_entries(folder, lambda: link.waiting() is None, _TAKING_SECONDS)
            if await in_fresh_thread(has_open, monitor, descriptor):
                await in_fresh_thread(append_from_now_on, monitor, descriptor)
                return True
        bound = await in_fresh_thread(_lead_next_to, link, monitor, descriptor, partial(reopen, container.id), told)
        opened = await wait_for_entries(folder, lambda: link.leads_to(bound), REOPEN_SECONDS)
        if opened:
            await in_fresh_thread(append_from_now_on, monitor, descriptor)
            await in_fresh_thread(link.release)
        return opened  # if not, it may still do so: then the file must exist, else it ends


def _lead_next_to(link: LogLink, monitor: ProcessName, descriptor: int, tell: Callable[[], None], told: bool) -> Path:
    """Have conmon open the new, empty file of ``descriptor``; returns where that is bound.

    conmon must be asked only once, and ``told`` says that a request waits: at a second one it would find nothing to
    open.
    """
    late = link.open_waiting() if told else None
    try:
        waiting = link.waiting()
        if late is not None and waiting is not None and os.path.sameopenfile(late, descriptor):
            return waiting
        bound = link.bind_next(descriptor)
        link.lead_next_to(bound)
        came = late is not None and has_open(monitor, late)  # just before, and it may have renamed the new link
        if came:
            link.lead_next_to(bound)
        if came or not told:
            tell()
        link.release(but=bound)
        return bound
    finally:
        if late is not None:
            os.close(late)
