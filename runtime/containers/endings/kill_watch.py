"""Finds out when the kernel last killed a process of a container for memory, and whether the container survived.

The kernel counts such kills, but reports neither their time nor the killed process. conmon makes a file when a memory
limit is reached. The agent deletes that file, waits until the killed process has ended, and records how many kills the
first process has survived. For kills while no agent runs, only the time of conmon's file is known.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec

from host import processes
from host.children.pidfd_exit import ended_by_signal
from host.concurrency.threads import in_thread
from host.files import procfs
from host.files.inotify import CreatedFiles
from runtime.cgroups.limits import memory_events_file, out_of_memory_kills
from runtime.cgroups.tree import CgroupTree
from runtime.state.container import Container, ContainerState

# Longer than the kernel needs from counting a kill to sending its signal.
_SETTLE_SECONDS = 0.1
# One check may use this share of a processor's time and read this many processes: a container can cause kills
# permanently.
_LOOK_SHARE = 0.05
_MAX_PROCESSES = 256

_log = logging.getLogger("podkeel.containers")


class SurvivedKills(msgspec.Struct):
    """The number of kills that a container's first process has survived, and when the last killed process ended.

    The time is in ns since the epoch.
    """

    kills: int = 0
    at: int = 0


@dataclass(frozen=True, slots=True)
class KillHistory:
    """The kills for memory in an ended container.

    ``survived`` counts the kills that its first process survived. ``more``: there was a later kill. ``at`` is the time
    of the last kill in nanoseconds since the epoch, None if unknown. ``ended_by`` is the signal that killed its first
    process, 0 for none, None if unknown.
    """

    survived: int
    more: bool
    at: int | None
    ended_by: int | None


@dataclass(frozen=True, slots=True)
class _Look:
    kills: int
    at: int
    dying: bool


@dataclass(slots=True)
class _Watched:
    container: Container
    numbers: list[int] = field(default_factory=list)
    task: asyncio.Task[None] | None = None
    at: int = 0
    again: bool = False
    init: int | None = None  # a pidfd


class KillWatch:
    """Checks each running container when a process in it is killed for memory. For use on the loop."""

    def __init__(self, cgroups: CgroupTree) -> None:
        self._cgroups = cgroups
        self._files: CreatedFiles | None = None
        self._watched: dict[str, _Watched] = {}
        self._looking = asyncio.Lock()

    def watch(self, container: Container) -> None:
        """Begin to watch a container whose first process runs. May be repeated."""
        if container.id in self._watched:
            return
        watched = self._watched[container.id] = _Watched(container)
        occurred = partial(self._occurred, watched)
        folder = container.folder
        try:
            if self._files is None:
                self._files = CreatedFiles()
            watched.numbers.append(self._files.watch_folder(folder.path, folder.out_of_memory.name, occurred))
            if self._cgroups.version == 2:  # conmon does not report kills for a limit of the pod or node
                events = memory_events_file(self._cgroups, container.record.cgroup)
                watched.numbers.append(self._files.watch_file(events, occurred))
        except OSError as error:
            _log.warning("%s: out-of-memory kills cannot be dated: %s", container.title, error)
        if container.record.state is ContainerState.RUNNING and self._is_news(container):
            self._occurred(watched)

    def _is_news(self, container: Container) -> bool:
        folder = container.folder
        kills = out_of_memory_kills(self._cgroups, container.record.cgroup)
        return folder.out_of_memory.exists() or kills > _read(folder.survived_kills).kills

    def history(self, container: Container, kills: int) -> KillHistory:
        """The kills in an ended container. ``kills`` are its own kills among those that its pod's cgroup counted.

        ``kills`` is used if systemd removed the container's cgroup, with its counters, before they were read.
        """
        folder, cgroup = container.folder, container.record.cgroup
        survived = _read(folder.survived_kills)
        watched = self._watched.get(container.id)
        noticed = max(_time_of(folder.out_of_memory), watched.at if watched is not None else 0)
        ended_by = ended_by_signal(watched.init) if watched is not None and watched.init is not None else None
        there = self._cgroups.exists(cgroup)
        count = (out_of_memory_kills(self._cgroups, cgroup) if there else kills) - survived.kills
        more, at = count > 0, noticed or None
        if noticed <= survived.at or (count > 1 and watched is None):
            at = None  # conmon's file has the time of the first kill that no agent noticed
        elif not there:
            more = True  # also if the count of the pod's cgroup may include several containers
        return KillHistory(survived.kills, more, at if more else survived.at, ended_by)

    def forget(self, container_id: str) -> None:
        """End the watch of a container. A container without a watch is no error."""
        watched = self._watched.pop(container_id, None)
        if watched is None:
            return
        if watched.task is not None:
            watched.task.cancel()
        if watched.init is not None:
            os.close(watched.init)
        if self._files is not None:
            for number in watched.numbers:
                self._files.forget(number)

    def close(self) -> None:
        """End all watches."""
        for container_id in list(self._watched):
            self.forget(container_id)
        if self._files is not None:
            self._files.close()
            self._files = None

    def _occurred(self, watched: _Watched) -> None:
        watched.again = True
        if watched.task is None:
            watched.task = asyncio.ensure_future(self._follow(watched))
            watched.task.add_done_callback(partial(self._followed, watched))

    def _followed(self, watched: _Watched, task: asyncio.Task[None]) -> None:
        watched.task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.warning("%s: out-of-memory kills cannot be dated: %s", watched.container.title, error)

    async def _follow(self, watched: _Watched) -> None:
        """Check until no process in the container is exiting and no further kill is counted."""
        before = -1
        while True:
            watched.again = False
            async with self._looking:
                begun = time.monotonic()
                look = await in_thread(self._look, watched.container)
                took = time.monotonic() - begun
                watched.at = max(watched.at, look.at)
                if not watched.again and not look.dying and look.kills == before:
                    self._has_survived(watched, look.kills)
                    return
                before = look.kills
                await asyncio.sleep(took / _LOOK_SHARE)
            await asyncio.sleep(_SETTLE_SECONDS)

    def _look(self, container: Container) -> _Look:
        file = container.folder.out_of_memory
        at = _time_of(file)
        file.unlink(missing_ok=True)  # before the count is read: a later kill causes a new check
        kills = out_of_memory_kills(self._cgroups, container.record.cgroup)
        pids = self._cgroups.processes(container.record.cgroup)[:_MAX_PROCESSES]
        dying = any(map(procfs.is_being_killed, pids))
        return _Look(kills, time.time_ns() if dying else at, dying)

    def _has_survived(self, watched: _Watched, kills: int) -> None:
        """If the first process still runs, record that it survived this number of kills."""
        container = watched.container
        file = container.folder.survived_kills
        init, before = container.record.init, _read(file)
        pidfd = processes.open_process(init.pid, init.started) if init is not None else None
        if pidfd is None or init is None:
            return
        if watched.init is not None or procfs.is_being_killed(init.pid):
            os.close(pidfd)
        else:
            watched.init = pidfd
        if watched.init is None or kills == before.kills or procfs.is_being_killed(init.pid):
            return  # also if only another container of its pod has reached a limit
        with contextlib.suppress(OSError):  # then only the time is unknown
            file.write_bytes(msgspec.json.encode(SurvivedKills(kills, watched.at)))


def _read(file: Path) -> SurvivedKills:
    try:
        return msgspec.json.decode(file.read_bytes(), type=SurvivedKills)
    except (OSError, msgspec.MsgspecError):
        return SurvivedKills()


def _time_of(file: Path) -> int:
    """When a file was made, 0 if it is missing."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0
