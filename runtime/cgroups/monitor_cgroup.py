"""The cgroup of conmon processes and inits of pods. Nothing that ends or limits the agent's own cgroup reaches them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Iterable
from pathlib import Path

from host.concurrency.threads import in_thread
from host.errors import CommandError, InvalidArgumentError, PodkeelError
from host.files.procfs import table_lines
from host.processes import ProcessName, start_time, wait_all_ended
from runtime.cgroups.slices import slice_path, start_scope, stop_unit, systemd_is_init
from runtime.cgroups.tree import CgroupTree

_DEFAULT_SLICE = "system.slice"
_END_SECONDS = 5.0
# A scope whose last process has ended still has its name for a moment.
_PAUSES = (0.2, 1.0, 3.0)

_log = logging.getLogger("podkeel.monitors")


class MonitorCgroup:
    """One cgroup for all conmon processes and inits of pods of an agent.

    With systemd it is a scope in the slice ``parent``. A process that only sleeps keeps the scope, also while no pod
    runs. Without systemd it is a cgroup below ``parent``. It exists only in the hierarchies where the agent is not in
    the root: the root cannot be killed or limited.

    Raises InvalidArgumentError if ``parent`` has the wrong form.
    """

    def __init__(self, cgroups: CgroupTree, parent: str, agent_id: str) -> None:
        self._cgroups = cgroups
        self._systemd = systemd_is_init()
        self._slice = parent or _DEFAULT_SLICE
        name = f"podkeel-monitors-{agent_id}"
        self._unit = f"{name}.scope"
        if self._systemd:
            if "/" in self._slice or not self._slice.endswith(".slice"):
                raise InvalidArgumentError(f"runtime.monitor_cgroup {parent!r}: must be a slice such as system.slice")
            self._path = f"{slice_path(self._slice)}/{self._unit}"
        else:
            if parent and (not parent.startswith("/") or ".." in parent.split("/")):
                raise InvalidArgumentError(f"runtime.monitor_cgroup {parent!r}: must be an absolute path of a cgroup")
            self._path = f"{parent.rstrip('/')}/{name}"
        self._entrances: tuple[Path, ...] = ()
        self._lock = asyncio.Lock()

    async def open(self) -> None:
        """Make the cgroup, unless it exists. If that fails, a warning is logged, and nothing enters the cgroup."""
        try:
            self._entrances = await self._made()
        except (PodkeelError, OSError) as error:
            self._entrances = ()
            _log.warning(
                "monitors: cgroup %s: cannot be made: %s: conmon stays in the agent's cgroup and ends with it",
                self._path,
                error,
            )

    async def _made(self) -> tuple[Path, ...]:
        roots = await in_thread(_roots_to_leave, self._cgroups)
        if roots and self._systemd:
            await self._make_scope()
        elif roots:
            await in_thread(self._cgroups.make, self._path, roots)
        return await in_thread(self._files, roots)

    def _files(self, roots: Iterable[Path]) -> tuple[Path, ...]:
        folders = (root / self._path.lstrip("/") for root in roots)
        return tuple(folder / "cgroup.procs" for folder in folders if folder.is_dir())

    async def _make_scope(self) -> None:
        for pause in (*_PAUSES, None):
            if await in_thread(self._cgroups.all_processes, self._path):
                return
            try:
                await start_scope(self._unit, self._slice, "Monitors of Podkeel's containers", ["sleep", "infinity"])
                return
            except CommandError:
                if pause is None:
                    raise
            await asyncio.sleep(pause)

    @property
    def is_used(self) -> bool:
        """Whether processes enter it. False if the agent is in the root of all hierarchies, or ``open`` failed."""
        return bool(self._entrances)

    def enter(self, pid: int) -> bool:
        """Move a process that has no children to the cgroup. False if the cgroup is gone: call ``enter_again``. Blocks.

        A process that has ended is no error.
        """
        try:
            for file in self._entrances:
                descriptor = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
                try:
                    os.write(descriptor, b"%d" % pid)
                finally:
                    os.close(descriptor)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return True

    async def enter_again(self, pid: int) -> None:
        """As ``enter``, when the cgroup was removed meanwhile: it is made again."""
        async with self._lock:
            if await in_thread(self.enter, pid):
                return
            _log.warning("monitors: cgroup %s: a process cannot enter it: it is made again", self._path)
            await self.open()
            if not await in_thread(self.enter, pid):
                _log.warning("monitors: process %d stays in the agent's cgroup and ends with it", pid)

    def adopt(self, processes: Iterable[ProcessName]) -> None:
        """Move processes to the cgroup that an agent of an older version started elsewhere. Blocks.

        One that has ended is no error.
        """
        wanted = os.fsencode(self._path)
        for process in processes if self._entrances else ():
            with contextlib.suppress(OSError):
                inside = any(line.split(b":", 2)[-1] == wanted for line in _cgroups_of(process.pid))
                if not inside and start_time(process.pid) == process.started:
                    self.enter(process.pid)

    async def remove(self) -> None:
        """Kill what is in the cgroup, and remove it. A missing one is no error."""
        if self._systemd and await in_thread(self._cgroups.exists, self._path):
            await in_thread(self._kill)
            await stop_unit(self._unit)
        elif not self._systemd:
            await in_thread(self._kill)
            await in_thread(self._cgroups.remove, self._path)

    def _kill(self) -> None:
        pids = self._cgroups.all_processes(self._path)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_all_ended(pids, _END_SECONDS)


def _roots_to_leave(cgroups: CgroupTree) -> list[Path]:
    """The mount points of the hierarchies in which this process is not in the root. Blocks."""
    found: dict[Path, None] = {}
    for line in _cgroups_of(os.getpid()):
        _, names, path = line.split(b":", 2)
        for name in os.fsdecode(names).split(",") if names else ("unified", "hybrid"):
            if path != b"/" and name in cgroups.mounts:
                found[cgroups.mounts[name]] = None
    return list(found)


def _cgroups_of(pid: int) -> list[bytes]:
    return list(table_lines(f"/proc/{pid}/cgroup"))
