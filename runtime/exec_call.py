"""One further process in a container: the OCI runtime's ``exec``, what it is given, and what becomes of it."""

from __future__ import annotations

import contextlib
import os
import signal
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from host.errors import CommandError
from runtime.oci_runtime import OciRuntime, naming

_PROCESS_DESCRIPTOR = 3
_LOG_DESCRIPTOR = 4
_LOG_BYTES = 65536


class _LogEntry(msgspec.Struct):
    level: str = ""
    msg: str = ""


class ExecCall:
    """The command line that runs ``process`` (an OCI ``process`` object as JSON), and the files it needs, for ``with``.

    ``program`` is what the process executes, for errors. ``folder`` is the container's bundle; ``pids`` lists the
    processes of the container's cgroup.
    """

    def __init__(
        self,
        *,
        runtime: OciRuntime,
        container_id: str,
        folder: Path,
        program: str,
        process: bytes,
        pids: Callable[[], Sequence[int]],
    ) -> None:
        self._runtime = runtime
        self._program = program
        self._container_id = container_id
        self._pids = pids
        self._pid_file = folder / f"exec-{uuid.uuid4().hex}.pid"
        with contextlib.ExitStack() as stack:
            stack.callback(self._pid_file.unlink, missing_ok=True)
            process_file = os.memfd_create("process")
            stack.callback(os.close, process_file)
            os.write(process_file, process)
            self._log_file = os.memfd_create("log")
            stack.callback(os.close, self._log_file)
            self.descriptors = {_PROCESS_DESCRIPTOR: process_file, _LOG_DESCRIPTOR: self._log_file}
            self._stack = stack.pop_all()

    @property
    def command(self) -> list[str]:
        """The command line; ``descriptors`` go with it."""
        # The runtime's own complaints go to its log, so that they are never taken for the process's output.
        runtime, log = self._runtime, f"/proc/self/fd/{_LOG_DESCRIPTOR}"
        options = [*runtime.arguments, "--log", log, "--log-format", "json"]
        process = f"/proc/self/fd/{_PROCESS_DESCRIPTOR}"
        words = ["exec", "--process", process, "--pid-file", str(self._pid_file), self._container_id]
        return [runtime.program, *options, *words]

    def exit_code(self, status: int) -> int:
        """The process's exit code from the runtime's ``status``. Raises CommandError if it was never started."""
        if status != 0 and (complaint := _errors_in(os.pread(self._log_file, _LOG_BYTES, 0))):
            command = [self._runtime.options.path, "exec", self._container_id]
            raise CommandError(command, status, naming(self._program, complaint))
        return status if status >= 0 else 128 - status

    def kill(self) -> None:
        """SIGKILL to the process, everything in its session and everything that descends from it."""
        _kill(self._pid_file, self._pids())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()


def end_abandoned(folder: Path, pids: Sequence[int]) -> int:
    """Kill what an agent that died ran beside the first process of the container with bundle ``folder``.

    ``pids`` are those in the container's cgroup. Returns how many such calls there were.
    """
    abandoned = list(folder.glob("exec-*.pid"))
    for pid_file in abandoned:
        _kill(pid_file, pids)
        pid_file.unlink()
    return len(abandoned)


def _kill(pid_file: Path, pids: Sequence[int]) -> None:
    try:
        leader = int(pid_file.read_text())
    except (OSError, ValueError):
        return
    relations = {pid: _parent_and_session(pid) for pid in pids}
    doomed = {leader}
    while found := {
        pid for pid, relation in relations.items() if pid not in doomed and not doomed.isdisjoint(relation)
    }:
        doomed |= found
    for pid in doomed & relations.keys():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _errors_in(log: bytes) -> str:
    """The error messages of an OCI runtime's log in JSON lines."""
    messages = []
    for line in log.splitlines():
        with contextlib.suppress(msgspec.DecodeError):
            entry = msgspec.json.decode(line, type=_LogEntry)
            if entry.level in ("error", "fatal"):
                messages.append(entry.msg)
    return "\n".join(messages)


def _parent_and_session(pid: int) -> tuple[int, int]:
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
    except OSError:
        return (0, 0)
    return (int(fields[1]), int(fields[3]))
