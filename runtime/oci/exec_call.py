"""One further process in a container: the OCI runtime's ``exec``, its input, and its result."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from host import processes, untrusted_json
from host.children.reaping import reap
from host.concurrency.priority import run_before_children
from host.concurrency.tasks import uninterrupted, wait_out
from host.concurrency.threads import in_thread
from host.errors import CommandError, DeadlineError, InvalidArgumentError, WrongStateError
from host.untrusted_json import JsonError
from runtime.oci.console_socket import ConsoleSocket
from runtime.oci.directory_probe import DIRECTORY_BY_DESCRIPTOR, DIRECTORY_DESCRIPTOR
from runtime.oci.exec_gate import ExecGate
from runtime.oci.exec_session import KILL_SECONDS, kill, kill_session, parent_and_session, recorded_pid
from runtime.oci.null_device import open_private_null
from runtime.oci.oci_runtime import OciRuntime, cannot_run_program, naming, plain_message
from runtime.oci.working_directory import WorkingDirectory

_PROCESS_DESCRIPTOR = 3
_LOG_DESCRIPTOR = 4
_LOG_BYTES = 65536
_START_SECONDS = 60.0
# How long a start may continue after its process is no longer wanted. When its pid is known, it can be killed.
_ABANDONED_SECONDS = 5.0
# When to look for zombies of a failed start: at once, and again after the time that they need to end. Their pids are
# unknown, and host.subreaper has the only handler of SIGCHLD, so there is nothing to wait for.
_STRAY_SECONDS = (0.0, 0.01, 0.05, 0.2)


class _LogEntry(msgspec.Struct):
    level: str = ""
    msg: str = ""


class ExecProcess:
    """A process in a container that is a child of the agent. ``ended`` becomes its exit code, 128 + n after signal n.

    ``session`` is its session, also after its end. Without a terminal it is the session of the OCI runtime's call.
    """

    def __init__(self, pid: int, session: int) -> None:
        self.pid = pid
        self.session = session
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._pidfd = os.pidfd_open(pid)
        processes.watch_exit(self._pidfd, self._on_end)

    def _on_end(self) -> None:
        status = reap(self._pidfd)
        os.close(self._pidfd)
        strays.awaited.discard(self.pid)
        self.ended.set_result(255 if status is None else status if status >= 0 else 128 - status)


class Strays:
    """Zombies that OCI runtimes made in a failed start and that the agent adopted.

    The kernel does not end the container until they are reaped, so this cannot wait for the subreaper.
    """

    def __init__(self) -> None:
        self.awaited: set[int] = set()
        self.starting = 0

    def begin(self) -> None:
        """A start begins. Its process is not known yet."""
        self.starting += 1

    def end(self, process: ExecProcess | None) -> None:
        """A start has ended: with this process, or with a failure (None)."""
        self.starting -= 1
        if process is not None:
            self.awaited.add(process.pid)
            return
        for delay in _STRAY_SECONDS:
            asyncio.get_running_loop().call_later(delay, self._reap)

    def _reap(self) -> None:
        if self.starting:
            return  # a child without a waiter may be a process that is being started
        with contextlib.suppress(ChildProcessError):
            while dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if dead.si_pid in self.awaited or not _is_in_inner_pid_namespace(dead.si_pid):
                    return  # its parent reaps it; host.subreaper reaps those behind it
                os.waitid(os.P_PID, dead.si_pid, os.WEXITED | os.WNOHANG)


strays = Strays()


class ExecCall:
    """The call that runs ``process`` (an OCI ``process`` object as JSON), and the files it needs, for ``with``.

    The OCI runtime detaches from the process, which then becomes a child of the agent. So no OCI runtime keeps running,
    and the process keeps its descriptors. With a terminal (``terminal``), ``console`` receives the master.

    ``program`` is what the process executes, for errors. ``folder`` is the container's bundle. ``pids`` lists the
    processes of the container's cgroup, and ``init`` is its first process. ``directory`` is opened at the launch, for a
    ``process`` whose working directory is DIRECTORY_BY_DESCRIPTOR. ``oom_score_adj`` is the value for the process.
    ``held_at`` is the root file system of a container in which the process waits until its terminal has a size.
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
        init: processes.ProcessName | None = None,
        terminal: bool = False,
        directory: WorkingDirectory | None = None,
        oom_score_adj: int = 0,
        held_at: Path | None = None,
    ) -> None:
        self._runtime = runtime
        self._held_at = held_at
        self._holding: asyncio.Future[None] | None = None
        self._oom_score_adj = oom_score_adj
        self._directory = directory
        self._program = program
        self._container_id = container_id
        self._pids = pids
        self._init = init
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
            self._descriptors = {_PROCESS_DESCRIPTOR: process_file, _LOG_DESCRIPTOR: self._log_file}
            silent = open_private_null()
            stack.callback(os.close, silent)
            self._descriptors |= dict.fromkeys((0, 1, 2), silent)
            if terminal:
                self.console = stack.enter_context(ConsoleSocket(folder, f"{name}.tty"))
                self._descriptors |= self.console.descriptors
            self._stack = stack.pop_all()

    def _command(self) -> list[str]:
        # The OCI runtime writes its own errors to its log, so that they are never mixed with the process's output.
        runtime, log = self._runtime, f"/proc/self/fd/{_LOG_DESCRIPTOR}"
        options = [*runtime.arguments, "--log", log, "--log-format", "json"]
        process = f"/proc/self/fd/{_PROCESS_DESCRIPTOR}"
        words = ["exec", "--detach", "--process", process, "--pid-file", str(self._pid_file)]
        if self.console is not None:
            words += ["--console-socket", self.console.path]
        prefix = [*_with_oom_score_adj(self._oom_score_adj), *runtime.exec_prefix]
        return [*prefix, runtime.executable(), *options, *words, self._container_id]

    async def launch(self, descriptors: Mapping[int, int]) -> None:
        """Start the OCI runtime. The process gets ``descriptors`` as standard streams, null devices for the others."""
        if self._directory is not None:
            opened = await self._directory.open(_START_SECONDS)
            self._stack.callback(os.close, opened)
            self._descriptors[DIRECTORY_DESCRIPTOR] = opened
        gate = ExecGate(self._held_at) if self._held_at is not None else None
        if gate is not None:
            self._stack.callback(gate.close)
        strays.begin()
        spawning = asyncio.ensure_future(self._spawn({**self._descriptors, **descriptors}))
        try:
            self._runtime_pid = await wait_out(spawning)
            if self.console is not None:
                # crun starts the program and sets the size of its terminal after that: it must do so at once.
                run_before_children(self._runtime_pid)
                if gate is not None:
                    holding = gate.hold(self._runtime_pid, str(self._pid_file), self.console.fileno())
                    self._holding = asyncio.ensure_future(holding)
        except asyncio.CancelledError:
            if spawning.cancelled() or spawning.exception() is not None:
                strays.end(None)
                raise
            self._runtime_pid = spawning.result()
            await uninterrupted(self._finish(asyncio.ensure_future(self._started())))
            raise
        except BaseException:
            strays.end(None)
            raise

    async def _spawn(self, descriptors: Mapping[int, int]) -> int:
        try:
            return await processes.spawn_in_thread(self._command, descriptors=descriptors)
        except OSError as error:
            if error.errno != errno.ETXTBSY:
                raise
            self._runtime.stop_using_copy()
        return await processes.spawn_in_thread(self._command, descriptors=descriptors)

    @asynccontextmanager
    async def process(self) -> AsyncIterator[ExecProcess]:
        """The running process, after ``launch``.

        The end of the block kills the process, its session and its descendants, and waits for its end. It does nothing
        if the process has ended. Raises CommandError if the process could not be started.
        """
        starting = asyncio.ensure_future(self._started())
        try:
            yield await asyncio.shield(starting)
        finally:
            await uninterrupted(self._finish(starting))

    async def _started(self) -> ExecProcess:
        process = None
        try:
            status = await self._runtime_ended()
            leader = recorded_pid(self._pid_file)
            if status != 0 or leader is None:
                complaint = _errors_in(os.pread(self._log_file, _LOG_BYTES, 0))
                if self._directory is not None:
                    complaint = complaint.replace(DIRECTORY_BY_DESCRIPTOR, self._directory.path)
                if cannot_run_program(complaint, self._program):
                    raise InvalidArgumentError(naming(self._program, plain_message(complaint)))
                if not await in_thread(self._pids) or (self._init is not None and processes.has_ended(self._init)):
                    raise WrongStateError(
                        f"container {self._container_id[:13]} ended before {self._program!r} was executed in it"
                    )
                command = [self._runtime.options.path, "exec", self._container_id]
                raise CommandError(command, status, naming(self._program, complaint))
            process = ExecProcess(leader, parent_and_session(leader)[1] or self._runtime_pid)
        except OSError:  # no descriptor was left to watch it by
            if (leader := recorded_pid(self._pid_file)) is not None:
                kill(leader)
            raise
        finally:
            strays.end(process)
        return process

    async def _runtime_ended(self) -> int:
        pidfd = processes.open_child(self._runtime_pid)
        try:
            async with asyncio.timeout(_START_SECONDS):
                await processes.wait_ended(pidfd)
        except BaseException as error:
            await processes.end_child(self._runtime_pid, pidfd)
            if (leader := recorded_pid(self._pid_file)) is not None:
                kill(leader)
            if isinstance(error, TimeoutError):
                program = self._runtime.options.path
                raise DeadlineError(f"{program} did not start {self._program!r} in {_START_SECONDS:g} s") from error
            raise
        status = reap(pidfd)
        os.close(pidfd)
        return 255 if status is None else status

    async def _finish(self, starting: asyncio.Future[ExecProcess]) -> None:
        if not starting.done():
            await asyncio.wait({starting}, timeout=_ABANDONED_SECONDS)
            starting.cancel()
            await asyncio.wait({starting})
        if not starting.cancelled() and starting.exception() is None:
            process = starting.result()
            if not process.ended.done():
                await in_thread(kill_session, process.pid, process.session, self._pids)
                await asyncio.wait({process.ended}, timeout=KILL_SECONDS)  # a frozen one ends when it is thawed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()


def _with_oom_score_adj(score: int) -> list[str]:
    """A prefix for a command, so that it runs with that oom_score_adj. Empty if the agent has the same value.

    crun (1.8) does not change the value of the process, and with the agent's value the kernel often kills it last. If
    it were set from outside, it would be too late for processes that the OCI runtime has started by then.
    """
    if int(Path("/proc/self/oom_score_adj").read_bytes()) == score:
        return []
    # Only a process with CAP_SYS_RESOURCE may lower its initial value. Without it, the process keeps the agent's value.
    return ["/bin/sh", "-c", '{ echo "$0" >/proc/self/oom_score_adj; } 2>/dev/null; exec "$@"', str(score)]


def _is_in_inner_pid_namespace(pid: int) -> bool:
    """Whether a process is in a PID namespace below the agent's: then it has further pids (proc(5), NSpid)."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", "rb") as status:
        return any(line.startswith(b"NSpid:") and len(line.split()) > 2 for line in status)
    return False


def _errors_in(log: bytes) -> str:
    """The error messages of an OCI runtime's log in JSON lines."""
    messages = []
    for line in log.splitlines():
        with contextlib.suppress(JsonError):
            # crun quotes names of files in the container, which may have any bytes.
            entry = untrusted_json.decode(line.decode(errors="replace").encode(), _LogEntry)
            if entry.level in ("error", "fatal"):
                messages.append(entry.msg)
    return "\n".join(messages)
