"""Makes conmon write the logs of containers to new files, after the old files were renamed."""

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
# The longest time that a running conmon takes from reading a request to opening its log.
_TAKING_SECONDS = 0.5


class ContainerLogs:
    """Reopens the logs of running containers."""

    def __init__(self, state: State, monitors: Monitors) -> None:
        self._state = state
        self._monitors = monitors

    async def reopen(self, container_id: str) -> None:
        """Write the log to a new file, if the old one was renamed.

        After any failure the old file is still used.

        Raises:
            WrongStateError: the container does not run, has no log, or its log path is another file with content.
            InvalidArgumentError: its log path is not a file, or a link leads from it out of the pod's log folder.
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
            raise WrongStateError(f"{container.title}: its conmon was killed, so its log is no longer written")
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
        """Make conmon open the new, empty file of ``descriptor``. Return whether it does so in time."""
        reopen = self._monitors.reopen_log
        link = LogLink(container.folder.path)
        if not link.is_used:  # an older version started its conmon, which knows the path itself
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
        requested = link.waiting() is not None and monitors.has_unread(container.id)
        if link.waiting() is not None and not requested:  # it is opening the file, or the agent died before asking it
            await wait_for_entries(folder, lambda: link.waiting() is None, _TAKING_SECONDS)
            if await in_fresh_thread(has_open, monitor, descriptor):
                await in_fresh_thread(append_from_now_on, monitor, descriptor)
                return True
        bound = await in_fresh_thread(
            _lead_next_to, link, monitor, descriptor, partial(reopen, container.id), requested
        )
        opened = await wait_for_entries(folder, lambda: link.leads_to(bound), REOPEN_SECONDS)
        if opened:
            await in_fresh_thread(append_from_now_on, monitor, descriptor)
            await in_fresh_thread(link.release)
        return opened  # if not, it may still open the file: then the file must exist, else conmon ends


def _lead_next_to(
    link: LogLink, monitor: ProcessName, descriptor: int, reopen_log: Callable[[], None], requested: bool
) -> Path:
    """Make conmon open the new, empty file of ``descriptor``. Returns the path where that is bound.

    conmon must be asked only once, because for a second request it would find no file to open. ``requested``: a request
    is already waiting.
    """
    late = link.open_waiting() if requested else None
    try:
        waiting = link.waiting()
        if late is not None and waiting is not None and os.path.sameopenfile(late, descriptor):
            return waiting
        bound = link.bind_next(descriptor)
        link.lead_next_to(bound)
        came = late is not None and has_open(monitor, late)  # just before; it may have renamed the new link
        if came:
            link.lead_next_to(bound)
        if came or not requested:
            reopen_log()
        link.release(but=bound)
        return bound
    finally:
        if late is not None:
            os.close(late)
