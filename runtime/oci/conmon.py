"""conmon: the small process beside each container. It writes the container's log and records its exit."""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
import termios
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

from host.files import procfs
from runtime.cgroups.monitor_cgroup import MonitorCgroup
from runtime.layout import Layout
from runtime.logs import LogFile, LogLink
from runtime.oci.conmon_start import SILENT_DESCRIPTOR, StartingMonitor
from runtime.state.truncindex import is_id

# conmon passes the node's /dev/null to the OCI runtime for standard streams that the container does not have. The OCI
# runtime may change its owner, and its descriptors are visible in the container. So a shell replaces these descriptors.
_SHELL = "/bin/sh"
_SILENCE_INPUT = f'exec <&{SILENT_DESCRIPTOR} {SILENT_DESCRIPTOR}<&-; exec "$0" "$@"'
_SILENCE_BOTH = f'exec <&{SILENT_DESCRIPTOR} >&0 {SILENT_DESCRIPTOR}<&-; exec "$0" "$@"'
_RUN = 'exec "$0" "$@"'
_EXIT_BYTES = 8192  # the space that conmon needs to write an exit code
_REOPEN_LOG = b"2 0 0\n"


@dataclass(frozen=True, slots=True)
class MonitorRequest:
    """The task of conmon: the container, its OCI runtime, and where its output is written.

    ``node_devices``: the container's /dev is the node's. OCI runtimes replace a null device among the standard streams
    by the container's /dev/null and change its owner to the container's user. So the standard input is an empty file.
    """

    container_id: str
    name: str
    runtime: Callable[[], str]
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
class ExitRecord:
    """How a container ended: the exit code as in a shell, and the time in nanoseconds since the epoch."""

    code: int
    finished_at: int


class Monitors:
    """Starts conmon for containers and reads the files that it leaves.

    ``cgroup`` is where conmon runs. Set it before the first ``prepare``.
    """

    cgroup: MonitorCgroup

    def __init__(self, conmon: str, layout: Layout) -> None:
        self._conmon = conmon
        self._layout = layout

    def _command(self, request: MonitorRequest, restoring: Restoring | None) -> list[str]:
        silence, runtime = request.silence, request.runtime()
        if restoring is not None:
            silence = restoring.script + (silence or _RUN)
        folder = self._layout.container(request.container_id).path
        command = [self._conmon, "-c", request.container_id, "-u", request.container_id]
        command += [
            "-n",
            _plain(request.name),
            "-r",
            _SHELL if silence else runtime,
            "-b",
            str(folder),
            "-p",
            str(folder / "init.pid"),
        ]
        command += ["--exit-dir", str(self._layout.exits), "--persist-dir", str(folder)]
        command += ["--sync", "--no-sync-log", "--full-attach"]
        command += ["-l", f"k8s-file:{LogLink(folder).path}" if request.log else "none"]
        silenced = ["-c", silence, runtime] if silence else []
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
            partial(self._command, request, restoring),
            folder,
            request.log,
            self.cgroup,
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
