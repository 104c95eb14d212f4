"""conmon: the small process beside each container. It writes the container's log and records its exit."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import shlex
import shutil
import termios
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import msgspec

from host import processes, untrusted_json
from host.children.reaping import reap
from host.concurrency.tasks import wait_out
from host.concurrency.threads import in_fresh_thread, in_thread
from host.errors import PodkeelError
from host.files import procfs
from host.processes import ProcessName
from host.untrusted_json import JsonError
from runtime.layout import ContainerFolder, Layout
from runtime.logs import LogFile, LogLink
from runtime.oci.null_device import open_private_null
from runtime.oci.oci_runtime import plain_message
from runtime.state.truncindex import is_id

# The descriptors on which conmon reports the result of the OCI runtime and waits for permission to start.
_SYNC_DESCRIPTOR = 3
_START_DESCRIPTOR = 4
# conmon passes the node's /dev/null to the OCI runtime for standard streams that the container does not have. The OCI
# runtime may change its owner, and its descriptors are visible in the container. So a shell replaces these descriptors.
_SILENT_DESCRIPTOR = 5
_SHELL = "/bin/sh"
_SILENCE_INPUT = f'exec <&{_SILENT_DESCRIPTOR} {_SILENT_DESCRIPTOR}<&-; exec "$0" "$@"'
_SILENCE_BOTH = f'exec <&{_SILENT_DESCRIPTOR} >&0 {_SILENT_DESCRIPTOR}<&-; exec "$0" "$@"'
_RUN = 'exec "$0" "$@"'
_SHOWN_BYTES = 200
_EXIT_BYTES = 8192  # the space that conmon needs to write an exit code
_REOPEN_LOG = b"2 0 0\n"
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
class MonitorRequest:
    """The task of conmon: the container, its OCI runtime, and where its output is written.

    ``node_devices``: the container's /dev is the node's. OCI runtimes replace a null device among the standard streams
    by the container's /dev/null and change its owner to the container's user. So the standard input is an empty file.
    """

    container_id: str
    name: str
    runtime: str
    runtime_arguments: Sequence[str]
    log: LogFile | None
    terminal: bool
    stdin: bool
    stdin_once: bool
    node_devices: bool = False

    @property
    def silence(self) -> str:
        """The shell's script before the OCI runtime. Empty if conmon connects all standard streams itself."""
        if self.terminal:
            return _SILENCE_BOTH
        return "" if self.stdin else _SILENCE_INPUT


@dataclass(frozen=True, slots=True)
class Restoring:
    """How a container is restored: CRIU's images, and the cgroup.

    ``cgroups`` are files that move a process into the container's cgroup. The OCI runtime, CRIU and the restored
    processes are in it from the beginning. ``environment`` is the OCI runtime's.
    """

    images: Path
    cgroups: Sequence[Path]
    environment: Mapping[str, str]

    @property
    def script(self) -> str:
        """The shell's script that enters the cgroups."""
        files = " ".join(shlex.quote(str(file)) for file in self.cgroups)
        return f'for file in {files}; do echo 0 > "$file" || exit 125; done; '


@dataclass(frozen=True, slots=True)
class Monitored:
    """A created container: its conmon and its first process."""

    monitor: ProcessName
    monitor_descriptor: int
    init: ProcessName


@dataclass(frozen=True, slots=True)
class ExitRecord:
    """How a container ended: the exit code as in a shell, and the time in nanoseconds since the epoch."""

    code: int
    finished_at: int


class StartingMonitor:
    """A conmon that is being started. It starts before the bundle is made, so that its program loads meanwhile."""

    def __init__(
        self,
        command: Sequence[str],
        folder: ContainerFolder,
        log: LogFile | None,
        *,
        node_devices: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._environment = environment
        self._command = command
        self._folder = folder
        self._log = log
        self._log_descriptor = -1
        self._node_devices = node_devices
        self._pid = -1
        self._pidfd = -1
        self._sync_read = -1
        self._start_write = -1
        self._spawned: asyncio.Future[ProcessName] | None = None

    def begin(self) -> None:
        """Start conmon now, before ``create``. The bundle need not exist yet."""
        self._begun()

    def _begun(self) -> asyncio.Future[ProcessName]:
        if self._spawned is None:
            # The log folder may be on a file system whose server does not answer.
            work = in_thread(self._spawn) if self._log is None else in_fresh_thread(self._spawn)
            self._spawned = asyncio.ensure_future(work)
        return self._spawned

    def _spawn(self) -> ProcessName:
        self._folder.path.mkdir(parents=True, exist_ok=True)
        if self._log is not None:
            self._log_descriptor = self._log.open()
            LogLink(self._folder.path).lead_to(self._log_descriptor)
        environment = {**(os.environ if self._environment is None else self._environment), **_ENVIRONMENT}
        if not all(word.isascii() for word in self._command):
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
            descriptors = {0: silent, 1: silent, 2: complaints, _SILENT_DESCRIPTOR: silent}
            descriptors |= {_SYNC_DESCRIPTOR: sync_write, _START_DESCRIPTOR: start_read}
            pid = processes.spawn(self._command, environment=environment, descriptors=descriptors)
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


class Monitors:
    """Starts conmon for containers and reads the files that it leaves."""

    def __init__(self, conmon: str, layout: Layout) -> None:
        self._conmon = conmon
        self._layout = layout

    def _command(self, request: MonitorRequest, restoring: Restoring | None) -> list[str]:
        silence = request.silence
        if restoring is not None:
            silence = restoring.script + (silence or _RUN)
        folder = self._layout.container(request.container_id).path
        command = [self._conmon, "-c", request.container_id, "-u", request.container_id]
        command += [
            "-n",
            _plain(request.name),
            "-r",
            _SHELL if silence else request.runtime,
            "-b",
            str(folder),
            "-p",
            str(folder / "init.pid"),
        ]
        command += ["--exit-dir", str(self._layout.exits), "--persist-dir", str(folder)]
        command += ["--sync", "--no-sync-log", "--full-attach"]
        command += ["-l", f"k8s-file:{LogLink(folder).path}" if request.log else "none"]
        silenced = ["-c", silence, request.runtime] if silence else []
        for argument in (*silenced, *request.runtime_arguments):
            command += ["--runtime-arg", argument]
        if restoring is not None:
            command += ["--restore", str(restoring.images), "--runtime-opt", "--file-locks"]
        if request.terminal:
            command.append("--terminal")
        if request.stdin:
            command.append("--stdin")
            if not request.stdin_once:
                command.append("--leave-stdin-open")
        return command

    def prepare(self, request: MonitorRequest, restoring: Restoring | None = None) -> StartingMonitor:
        """Prepare a conmon. Its ``create`` creates the container, its ``abandon`` ends conmon.

        With ``restoring`` the container is restored, and runs after ``create``.
        """
        folder = self._layout.container(request.container_id)
        return StartingMonitor(
            self._command(request, restoring),
            folder,
            request.log,
            node_devices=request.node_devices,
            environment=restoring.environment if restoring is not None else None,
        )

    def running(self) -> dict[str, int]:
        """The pids of this agent's conmon processes, by container id, also those that were never recorded.

        Any process can choose its name. So a process counts only if it executes conmon's program as root.
        """
        program = shutil.which(self._conmon) or self._conmon
        bundles = os.fsencode(self._layout.containers) + b"/"
        found: dict[str, int] = {}
        for pid in procfs.all_pids():
            if procfs.runs_program(pid, program):
                words = procfs.command_line(pid)
                bundle = next((after for word, after in pairwise(words) if word == b"-b"), b"")
                container_id = os.fsdecode(bundle.removeprefix(bundles))
                if bundle.startswith(bundles) and is_id(container_id):
                    found[container_id] = pid
        return found

    def exit_record(self, container_id: str) -> ExitRecord | None:
        """conmon's record of a container's end; None if there is none."""
        try:
            with open(self._layout.exits / container_id, "rb") as file:
                code = int(file.read() or b"255")
                finished_at = os.fstat(file.fileno()).st_mtime_ns
        except (FileNotFoundError, ValueError):
            return None
        return ExitRecord(code, finished_at)

    def why_no_exit_record(self) -> str:
        """The message for clients about an end that conmon did not record."""
        room = os.statvfs(self._layout.exits)
        if room.f_bavail * room.f_frsize < _EXIT_BYTES or (room.f_files and not room.f_favail):
            return f"its end was not recorded: no space is left in {self._layout.exits}: free some"
        return "its end was not recorded: its monitor was killed or the node restarted"

    def forget(self, container_id: str) -> None:
        """Delete a container's exit record. A missing one is no error."""
        (self._layout.exits / container_id).unlink(missing_ok=True)

    def reopen_log(self, container_id: str) -> None:
        """Make conmon open the log path again, after the file was renamed. Raises OSError if conmon does not listen."""
        control = os.open(self._layout.container(container_id).control, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.write(control, _REOPEN_LOG)
        finally:
            os.close(control)

    def has_unread(self, container_id: str) -> bool:
        """Whether conmon still has to read a message. Raises OSError if no message can be sent to it."""
        control = os.open(self._layout.container(container_id).control, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return fcntl.ioctl(control, termios.FIONREAD, bytes(4)) != bytes(4)
        finally:
            os.close(control)


def _plain(name: str) -> str:
    """A name for process lists, without characters that conmon or a terminal could interpret."""
    return re.sub(r"[^A-Za-z0-9._/-]", "_", name)


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
