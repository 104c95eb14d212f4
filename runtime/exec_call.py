"""One further process in a container: the OCI runtime's ``exec``, what it is given, and what becomes of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from host import processes
from host.errors import CommandError
from host.null_device import open_private_null
from host.threads import in_thread
from runtime.console_socket import ConsoleSocket
from runtime.oci_runtime import OciRuntime, naming

_PROCESS_DESCRIPTOR = 3
_LOG_DESCRIPTOR = 4
_LOG_BYTES = 65536
# How long a killed call may take to write down its process, and how often that is looked for.
_START_SECONDS = 5.0
_START_POLL = 0.005
# How often the processes of a session are looked up again, for those that were just being made.
_KILL_ROUNDS = 20
_KILL_POLL = 0.002


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
        terminal: bool = False,
    ) -> None:
        self._runtime = runtime
        self._program = program
        self._container_id = container_id
        self._pids = pids
        name = f"exec-{uuid.uuid4().hex}"
        self._pid_file = folder / f"{name}.pid"
        self.console: ConsoleSocket | None = None
        with contextlib.ExitStack() as stack:
            stack.callback(self._pid_file.unlink, missing_ok=True)
            process_file = os.memfd_create("process")
            stack.callback(os.close, process_file)
            os.write(process_file, process)
            self._log_file = os.memfd_create("log")
            stack.callback(os.close, self._log_file)
            self.descriptors = {_PROCESS_DESCRIPTOR: process_file, _LOG_DESCRIPTOR: self._log_file}
            self.descriptors |= dict.fromkeys((0, 1, 2), open_private_null())
            if terminal and runtime.hands_over_terminals:
                self.console = stack.enter_context(ConsoleSocket(folder, f"{name}.tty"))
                self.descriptors |= self.console.descriptors
            self._stack = stack.pop_all()

    @property
    def command(self) -> list[str]:
        """The command line; ``descriptors`` go with it, the standard ones silent unless the caller has others."""
        # The runtime's own complaints go to its log, so that they are never taken for the process's output.
        runtime, log = self._runtime, f"/proc/self/fd/{_LOG_DESCRIPTOR}"
        options = [*runtime.arguments, "--log", log, "--log-format", "json"]
        process = f"/proc/self/fd/{_PROCESS_DESCRIPTOR}"
        words = ["exec", "--process", process, "--pid-file", str(self._pid_file)]
        if self.console is not None:
            words += ["--console-socket", self.console.path]
        return [runtime.program, *options, *words, self._container_id]

    def exit_code(self, status: int) -> int:
        """The process's exit code from the runtime's ``status``. Raises CommandError if it was never started."""
        if status != 0 and (complaint := _errors_in(os.pread(self._log_file, _LOG_BYTES, 0))):
            command = [self._runtime.options.path, "exec", self._container_id]
            raise CommandError(command, status, naming(self._program, complaint))
        return status if status >= 0 else 128 - status

    async def kill(self, ended: asyncio.Future[Any], runtime_pid: int) -> None:
        """End the process, everything in its session and everything that descends from it, and wait for the runtime.

        ``ended`` is done once the OCI runtime's own process, ``runtime_pid``, has ended.
        """
        # The runtime must first have written down whom it started, else that one would be left.
        deadline = time.monotonic() + _START_SECONDS
        while not ended.done() and (leader := _leader(self._pid_file)) is None and time.monotonic() < deadline:
            await asyncio.wait({ended}, timeout=_START_POLL)
        if (leader := _leader(self._pid_file)) is not None:
            await in_thread(_kill_session, leader, self._pids)
        if not ended.done():
            processes.kill_group(runtime_pid)
        await asyncio.wait({ended})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()


def end_abandoned(folder: Path, pids: Callable[[], Sequence[int]]) -> int:
    """Kill what an agent that died ran beside the first process of the container with bundle ``folder``.

    ``pids`` lists those in the container's cgroup. Returns how many such calls there were.
    """
    abandoned = list(folder.glob("exec-*.pid"))
    for pid_file in abandoned:
        if (leader := _leader(pid_file)) is not None:
            _kill_session(leader, pids)
        pid_file.unlink()
    for console in folder.glob("exec-*.tty"):
        console.unlink()
    return len(abandoned)


def _leader(pid_file: Path) -> int | None:
    """The pid that the OCI runtime wrote down; None before it has."""
    try:
        return int(pid_file.read_text())
    except (OSError, ValueError):
        return None


def _kill_session(leader: int, pids: Callable[[], Sequence[int]]) -> None:
    """SIGKILL to ``leader``, its session and its descendants among ``pids``, until none is left."""
    doomed = {leader}
    for _ in range(_KILL_ROUNDS):
        relations = {pid: _parent_and_session(pid) for pid in pids()}
        while found := {
            pid for pid, relation in relations.items() if pid not in doomed and not doomed.isdisjoint(relation)
        }:
            doomed |= found
        left = doomed & relations.keys()
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_KILL_POLL)


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
