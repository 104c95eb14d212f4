"""The start of a conmon: its program loads while the bundle is made, then the OCI runtime creates the container."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from host import processes, untrusted_json
from host.children.reaping import reap
from host.concurrency.tasks import wait_out
from host.concurrency.threads import in_fresh_thread, in_thread
from host.errors import PodkeelError
from host.processes import ProcessName
from host.untrusted_json import JsonError
from runtime.cgroups.monitor_cgroup import MonitorCgroup
from runtime.layout import ContainerFolder
from runtime.logs import LogFile, LogLink
from runtime.oci.null_device import open_private_null
from runtime.oci.oci_runtime import plain_message

# The descriptors on which conmon reports the result of the OCI runtime and waits for permission to start.
_SYNC_DESCRIPTOR = 3
_START_DESCRIPTOR = 4
SILENT_DESCRIPTOR = 5
"""The descriptor of the file that replaces the standard streams of the OCI runtime."""
_SHOWN_BYTES = 200
_ENVIRONMENT = {
    "_OCI_SYNCPIPE": str(_SYNC_DESCRIPTOR),
    "_OCI_STARTPIPE": str(_START_DESCRIPTOR),
    "TZ": "UTC",
    "LC_ALL": "C",  # otherwise it and the OCI runtime search for a locale's files
}


class RuntimeRefusedError(PodkeelError):
    """The OCI runtime did not create the container. The message is the OCI runtime's own."""


class _SyncMessage(msgspec.Struct):
    pid: int = -1
    message: str = ""


@dataclass(frozen=True, slots=True)
class Monitored:
    """A created container: its conmon and its first process."""

    monitor: ProcessName
    monitor_descriptor: int
    init: ProcessName


class StartingMonitor:
    """A conmon that is being started. It starts before the bundle is made, so that its program loads meanwhile."""

    def __init__(
        self,
        command: Callable[[], Sequence[str]],
        folder: ContainerFolder,
        log: LogFile | None,
        cgroup: MonitorCgroup,
        *,
        node_devices: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._environment = environment
        self._command = command
        self._folder = folder
        self._log = log
        self._cgroup = cgroup
        self._log_descriptor = -1
        self._node_devices = node_devices
        self._pid = -1
        self._pidfd = -1
        self._sync_read = -1
        self._start_write = -1
        self._spawned: asyncio.Future[ProcessName] | None = None
        self._entered: asyncio.Future[None] | None = None

    def begin(self) -> None:
        """Start conmon now, before ``create``. The bundle need not exist yet."""
        self._begun()

    def _begun(self) -> asyncio.Future[ProcessName]:
        if self._spawned is None:
            # The log folder may be on a file system whose server does not answer.
            work = in_thread(self._spawn) if self._log is None else in_fresh_thread(self._spawn)
            self._spawned = asyncio.ensure_future(work)
            if self._cgroup.is_used:
                self._entered = asyncio.ensure_future(self._enter(self._spawned))
        return self._spawned

    async def _enter(self, spawned: asyncio.Future[ProcessName]) -> None:
        """Move conmon out of the agent's cgroup, while it loads and the OCI runtime works.

        After a quiet time the kernel needs many milliseconds for that. If the OCI runtime starts before, it stays in
        the agent's cgroup until it has created the container.
        """
        await asyncio.wait({spawned})
        if not spawned.cancelled() and spawned.exception() is None:
            pid = spawned.result().pid
            if not await in_thread(self._cgroup.enter, pid):
                await self._cgroup.enter_again(pid)

    def _spawn(self) -> ProcessName:
        self._folder.path.mkdir(parents=True, exist_ok=True)
        if self._log is not None:
            self._log_descriptor = self._log.open()
            LogLink(self._folder.path).lead_to(self._log_descriptor)
        environment = {**(os.environ if self._environment is None else self._environment), **_ENVIRONMENT}
        command = self._command()
        if not all(word.isascii() for word in command):
            environment["LC_ALL"] = "C.UTF-8"  # otherwise conmon refuses its command line
        with contextlib.ExitStack() as child_ends:
            self._sync_read, sync_write = os.pipe2(os.O_CLOEXEC)
            child_ends.callback(os.close, sync_write)
            start_read, self._start_write = os.pipe2(os.O_CLOEXEC)
            child_ends.callback(os.close, start_read)
            complaints = os.open(self._folder.monitor_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            child_ends.callback(os.close, complaints)
            silent = _open_empty_file() if self._node_devices else open_private_null()
            child_ends.callback(os.close, silent)
            descriptors = {0: silent, 1: silent, 2: complaints, SILENT_DESCRIPTOR: silent}
            descriptors |= {_SYNC_DESCRIPTOR: sync_write, _START_DESCRIPTOR: start_read}
            pid = processes.spawn(command, environment=environment, descriptors=descriptors)
        self._pidfd = processes.open_child(pid)
        self._pid = pid
        return ProcessName(pid, processes.start_time(pid) or 0)

    async def create(self) -> Monitored:
        """Have the OCI runtime create the container, whose bundle is complete.

        Raises:
            RuntimeRefusedError: the OCI runtime failed, with its own message. Call ``abandon`` then.
        """
        monitor = await wait_out(self._begun())
        with contextlib.suppress(BrokenPipeError):  # it ended early: its answer or its log has the reason
            os.write(self._start_write, b"\0")
        init_pid = await self._created()
        if self._entered is not None:
            await wait_out(self._entered)
        monitored = Monitored(monitor, self._pidfd, ProcessName(init_pid, processes.start_time(init_pid) or 0))
        self._pidfd = -1
        self._close_pipes()
        return monitored

    async def _created(self) -> int:
        answer = await _read_line(self._sync_read)
        if not answer:
            raise PodkeelError(f"conmon ended without a message: {_last_lines(self._folder.monitor_log)}")
        # conmon truncates the OCI runtime's error at any byte, also inside a character.
        try:
            message = untrusted_json.decode(answer.decode(errors="replace").encode(), _SyncMessage)
        except JsonError as error:
            shown = answer[:_SHOWN_BYTES].decode(errors="replace")
            raise PodkeelError(f"conmon answered {shown!r}, which cannot be decoded: {error}") from error
        if message.pid <= 0:
            raise RuntimeRefusedError(plain_message(message.message.strip()) or _last_lines(self._folder.monitor_log))
        return message.pid

    async def abandon(self) -> None:
        """End conmon, unless ``create`` has succeeded. After that, conmon and the OCI runtime do nothing more.

        The caller deletes what the OCI runtime has made.
        """
        if self._spawned is None:
            return
        with contextlib.suppress(PodkeelError, OSError):
            await wait_out(self._spawned)
        if self._entered is not None:
            await wait_out(self._entered)  # until conmon is reaped, its pid belongs to no other process
        if self._pidfd >= 0:
            pidfd, self._pidfd = self._pidfd, -1
            try:  # also the OCI runtime that conmon waits for: the caller is about to delete what it made
                await in_fresh_thread(processes.end_group, self._pid)
            finally:
                _reap_when_ended(pidfd)
        self._close_pipes()

    def _close_pipes(self) -> None:
        for descriptor in (self._sync_read, self._start_write, self._log_descriptor):
            if descriptor >= 0:
                os.close(descriptor)
        self._sync_read = self._start_write = self._log_descriptor = -1


def _reap_when_ended(pidfd: int) -> None:
    def ended() -> None:
        reap(pidfd)
        os.close(pidfd)

    processes.watch_exit(pidfd, ended)


async def _read_line(descriptor: int) -> bytes:
    """Read up to a newline or the end from a pipe."""
    loop = asyncio.get_running_loop()
    os.set_blocking(descriptor, False)
    done: asyncio.Future[bytes] = loop.create_future()
    received = bytearray()

    def ready() -> None:
        try:
            chunk = os.read(descriptor, 65536)
        except BlockingIOError:
            return
        received.extend(chunk)
        if (not chunk or chunk.endswith(b"\n")) and not done.done():
            done.set_result(bytes(received))

    loop.add_reader(descriptor, ready)
    try:
        return await done
    finally:
        loop.remove_reader(descriptor)


def _open_empty_file() -> int:
    """A descriptor of an empty file without a path. No process can write to it."""
    descriptor = os.memfd_create("empty", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
    return descriptor


def _last_lines(path: Path) -> str:
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-5:])
    except OSError:
        return ""
