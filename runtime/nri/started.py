"""Plugins that the agent starts from a folder. It ends them when it stops."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from host import processes
from host.children.reaping import reap
from host.concurrency.threads import in_thread
from host.errors import PodkeelError
from runtime.nri.options import NriOptions
from runtime.nri.plugins.trunk import Trunk

_FILE = re.compile(r"([0-9]{2})-([A-Za-z0-9._-]{1,120})")
_MAX_FILES = 64
_CONFIGURATION_BYTES = 1 << 20
_END_SECONDS = 2.0
_SOCKET = 3  # the number of the plugin's descriptor
_log = logging.getLogger("podkeel.nri")

NewTrunk = Callable[[str, str, str, Callable[[], None]], Trunk]
NoteGone = Callable[[str, str], None]


@dataclass(frozen=True, slots=True)
class _Program:
    """An executable of the folder, with its configuration."""

    path: Path
    index: str
    name: str
    configuration: str
    file: tuple[int, ...]  # changes with the content of the executable

    @property
    def title(self) -> str:
        return f"{self.index}-{self.name}"


@dataclass(slots=True)
class _Process:
    """A plugin that was started and has not ended."""

    program: _Program
    pidfd: int
    trunk: Trunk | None = None
    replaced: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class StartedPlugins:
    """The plugins of ``options.plugin_dir``.

    ``new_trunk`` makes the protocol for a plugin's socket. Its arguments are the configuration, name and index, and a
    function that it calls when the connection has ended. ``note_gone`` is called with the title of a plugin that cannot
    be started or that ended, and the reason. ``record`` is a file that names the processes. With it, the next start
    ends the plugins of an agent that was killed.
    """

    def __init__(self, options: NriOptions, new_trunk: NewTrunk, note_gone: NoteGone, record: Path) -> None:
        self._options = options
        self._new_trunk = new_trunk
        self._note_gone = note_gone
        self._record = record
        self._running: dict[int, _Process] = {}

    async def start(self) -> None:
        """Start all plugins. One that cannot be started is logged and left out."""
        await in_thread(_end_recorded, self._record)
        for program in await in_thread(lambda: list(_programs(self._options))):
            await self._try_start(program)

    async def reload(self) -> list[str]:
        """Read the folders again: end plugins that are gone or changed, and start changed, new and ended ones.

        A plugin is changed if its executable or its configuration is. Returns a sentence for each that was started or
        ended. The new ones register after this.
        """
        wanted = {program.title: program for program in await in_thread(lambda: list(_programs(self._options)))}
        old = {pid: it.program for pid, it in self._running.items() if wanted.get(it.program.title) != it.program}
        await asyncio.gather(*(self._replace(pid) for pid in old))
        running = {it.program.title for it in self._running.values()}
        started = [program for title, program in wanted.items() if title not in running]
        begun = [program.title for program in started if await self._try_start(program)]
        ended = [f"plugin {program.title}: ended" for program in old.values()]
        return sorted([*ended, *(f"plugin {title}: started" for title in begun)])

    async def _replace(self, pid: int) -> None:
        """End a plugin whose file or configuration changed. Its process has some seconds for it."""
        process = self._running[pid]
        process.replaced = True
        if process.trunk is not None:
            process.trunk.close("a reload found it changed or removed")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_SECONDS):
                await process.ended.wait()
        if not process.ended.is_set():
            processes.kill_group(pid)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_END_SECONDS):
                    await process.ended.wait()

    async def _try_start(self, program: _Program) -> bool:
        try:
            await self._start(program)
        except (PodkeelError, OSError) as error:
            _log.error("nri: plugin %s: cannot be started: %s: %s", program.title, program.path, error)
            self._note_gone(program.title, f"cannot be started: {error}")
            return False
        return True

    async def _start(self, program: _Program) -> None:
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as stack:
            stack.callback(theirs.close)
            pid = await processes.spawn_in_thread(
                [str(program.path)],
                environment=_environment(program),
                descriptors={2: 2, _SOCKET: theirs.fileno()},
            )
            stack.pop_all()
        theirs.close()
        pidfd = processes.open_child(pid)
        process = self._running[pid] = _Process(program, pidfd)
        processes.watch_exit(pidfd, lambda: self._ended(pid))
        await in_thread(self._write_record)
        trunk = self._new_trunk(program.configuration, program.name, program.index, partial(self._disconnected, pid))
        process.trunk = trunk
        await asyncio.get_running_loop().create_connection(lambda: trunk, sock=ours)
        _log.info("nri: plugin %s: started: %s, pid %d", program.title, program.path, pid)

    def _disconnected(self, pid: int) -> None:
        """End the process of a plugin whose connection was closed, because it cannot connect again."""
        asyncio.get_running_loop().call_later(_END_SECONDS, self._end_rest, pid)

    def _end_rest(self, pid: int) -> None:
        if pid in self._running:
            title = self._running[pid].program.title
            _log.warning("nri: plugin %s: pid %d did not end after its connection was closed: it is killed", title, pid)
            processes.kill_group(pid)

    def _ended(self, pid: int) -> None:
        process = self._running.pop(pid)
        title = process.program.title
        status = reap(process.pidfd)
        os.close(process.pidfd)
        process.ended.set()
        if process.replaced:
            _log.info("nri: plugin %s: pid %d ended with status %s after a reload", title, pid, status)
            return
        why = f"pid {pid} ended with status {status}; it is not started again"
        self._note_gone(title, why)
        _log.warning("nri: plugin %s: %s", title, why)

    def _write_record(self) -> None:
        named = ((pid, processes.start_time(pid)) for pid in list(self._running))
        self._record.write_text("".join(f"{pid} {started}\n" for pid, started in named if started is not None))

    async def close(self) -> None:
        """Kill the plugins that did not end after their connections were closed."""
        deadline = asyncio.get_running_loop().time() + _END_SECONDS
        for pid, process in list(self._running.items()):
            title, pidfd = process.program.title, process.pidfd
            asyncio.get_running_loop().remove_reader(pidfd)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await processes.wait_ended(pidfd)
            if processes.start_time(pid) is not None:
                _log.warning("nri: plugin %s: pid %d did not end in time: it is killed", title, pid)
            del self._running[pid]
            await processes.end_child(pid, pidfd)
        with contextlib.suppress(FileNotFoundError):
            self._record.unlink()


def _environment(program: _Program) -> Mapping[str, str]:
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "NRI_PLUGIN_NAME": program.name,
        "NRI_PLUGIN_IDX": program.index,
        "NRI_PLUGIN_SOCKET": str(_SOCKET),
    }


def _programs(options: NriOptions) -> Iterator[_Program]:
    """The executables of the folder, by name. Other files are logged."""
    folder = Path(options.plugin_dir)
    try:
        names = sorted(file.name for file in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        _log.error("nri: nri.plugin_dir %s: cannot be read: %s", folder, error.strerror)
        return
    if len(names) > _MAX_FILES:
        _log.error("nri: nri.plugin_dir %s: has %d files: only the first %d are read", folder, len(names), _MAX_FILES)
    for name in names[:_MAX_FILES]:
        match = _FILE.fullmatch(name)
        problem = _problem(folder / name) if match else "its name is not two digits, a hyphen and a name, as 10-logger"
        if match is None or problem:
            _log.warning("nri: nri.plugin_dir: %s: not started: %s", folder / name, problem)
            continue
        try:
            configuration = _configuration(Path(options.config_dir), name, match[2])
        except (OSError, ValueError) as error:
            _log.error("nri: plugin %s: not started: its configuration cannot be read: %s", name, error)
            continue
        try:
            status = (folder / name).stat()
        except OSError:
            continue  # removed just now
        file = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        yield _Program(folder / name, match[1], match[2], configuration, file)


def _problem(path: Path) -> str:
    """Why the agent does not start this file, which would run as root; empty if it does."""
    try:
        status = path.stat()
    except OSError as error:
        return str(error.strerror)
    if not stat.S_ISREG(status.st_mode) or not status.st_mode & 0o111:
        return "it is not an executable file"
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o002:
        return "users other than root can change it: chown it to root and remove the write permission of others"
    return ""


def _configuration(folder: Path, name: str, plain_name: str) -> str:
    for file in (f"{name}.conf", f"{plain_name}.conf"):
        try:
            with (folder / file).open("rb") as opened:
                content = opened.read(_CONFIGURATION_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            continue
        if len(content) > _CONFIGURATION_BYTES:
            raise ValueError(f"{folder / file} is larger than {_CONFIGURATION_BYTES} bytes")
        return content.decode()
    return ""


def _end_recorded(record: Path) -> None:
    """End the plugins of an agent that was killed. Blocks."""
    try:
        lines = record.read_text().splitlines()
    except (FileNotFoundError, UnicodeDecodeError):
        return
    for line in lines[:_MAX_FILES]:
        numbers = line.split()
        if len(numbers) == 2 and all(number.isdigit() for number in numbers):
            pid, started = map(int, numbers)
            pidfd = processes.open_process(pid, started) if 0 < pid < 1 << 22 else None
            if pidfd is not None:
                os.close(pidfd)
                _log.warning("nri: pid %d: ended: an earlier agent started this plugin", pid)
                processes.end_group(pid)
    record.unlink(missing_ok=True)
