"""Starts external commands (posix_spawn, like vfork), and notices exits by pidfds."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self, TypeAlias

import msgspec

from host.children.reaping import reap
from host.children.spawning import posix_spawn
from host.concurrency.tasks import uninterrupted, wait_out
from host.concurrency.threads import in_thread
from host.errors import CommandError, DeadlineError, UnavailableError

OUTPUT_LIMIT = 16 * 1024 * 1024
_CHUNK = 256 * 1024
# How long to wait for the end of a killed process.
_END_SECONDS = 5.0
_PF_EXITING = 0x4  # include/linux/sched.h


# The words of a command line, or a function that returns them, which may block and is called in a thread.
Command: TypeAlias = Sequence[str] | Callable[[], Sequence[str]]


class ProcessName(msgspec.Struct, frozen=True):
    """A process, identified also after its end: its pid, and its start time in clock ticks since boot."""

    pid: int
    started: int


@dataclass(frozen=True, slots=True)
class Completed:
    """The result of a command: ``status`` is its exit status, or minus the signal that killed it."""

    status: int
    stdout: bytes
    stderr: bytes


def spawn(
    command: Command,
    *,
    environment: Mapping[str, str] | None = None,
    descriptors: Mapping[int, int] | None = None,
    title: str | None = None,
) -> int:
    """Start ``command`` in a new session and return its pid.

    ``descriptors`` maps descriptor numbers of the child to numbers of this process. Of 0, 1 and 2, those without an
    entry are /dev/null. All others are closed in the child. ``title`` is shown in process lists instead of the
    program's path. Raises UnavailableError if the program is missing, OSError for other errors.
    """
    words = command() if callable(command) else command
    with contextlib.ExitStack() as stack:
        # A number for the child may be a number here that is copied later: all are copied to high numbers first.
        lifted: dict[int, int] = {}
        for child, ours in (descriptors or {}).items():
            lifted[child] = _lift(ours)
            stack.callback(os.close, lifted[child])
        try:
            return posix_spawn(words, title or words[0], os.environ if environment is None else environment, lifted)
        except FileNotFoundError as error:
            # Not NotFoundError: a caller that removes an object would take it as removed already.
            raise UnavailableError(f"program {words[0]!r} is not installed or not on the PATH") from error


async def spawn_in_thread(
    command: Command,
    *,
    environment: Mapping[str, str] | None = None,
    descriptors: Mapping[int, int] | None = None,
) -> int:
    """As ``spawn``, but in a thread, so that the loop does not wait until the child executes its program.

    The thread also calls ``command``, if that is a function: it may look at a file system that does not answer.

    If the caller is cancelled meanwhile, the child is killed and reaped.
    """
    work = partial(spawn, command, environment=environment, descriptors=descriptors)
    spawned = asyncio.ensure_future(in_thread(work))
    try:
        return await wait_out(spawned)
    except asyncio.CancelledError:
        if not spawned.cancelled() and spawned.exception() is None:
            _end_child(spawned.result())
        raise


def _lift(descriptor: int) -> int:
    import fcntl

    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 200)


def open_child(pid: int) -> int:
    """A pidfd for a child that was just started. If the kernel does not return one, raises OSError after killing and
    reaping the child."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise  # it was reaped elsewhere, so its pid may belong to another process
    except OSError:
        _end_child(pid)
        raise


def _end_child(pid: int) -> None:
    kill_group(pid)
    os.waitpid(pid, 0)


def watch_exit(pidfd: int, callback: Callable[[], None]) -> None:
    """Call ``callback`` once on the running loop when the process of ``pidfd`` has ended. The descriptor stays open."""
    loop = asyncio.get_running_loop()

    def ended() -> None:
        loop.remove_reader(pidfd)
        callback()

    loop.add_reader(pidfd, ended)


async def wait_ended(pidfd: int) -> None:
    """Wait until the process of ``pidfd`` has ended. The descriptor must have no other watcher."""
    ended = asyncio.Event()
    watch_exit(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        asyncio.get_running_loop().remove_reader(pidfd)


async def end_child(pid: int, pidfd: int) -> int | None:
    """Send SIGKILL to a child and its process group, and wait for its end, even if the caller is cancelled meanwhile.

    Closes ``pidfd``. Returns how it ended, as ``reap`` does. None if the kernel kept it for seconds: then it is reaped
    when it ends.
    """
    kill_group(pid)
    return await uninterrupted(_collect_killed(pidfd))


async def _collect_killed(pidfd: int) -> int | None:
    ended: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()

    def collect() -> None:
        ended.set_result(reap(pidfd))
        os.close(pidfd)

    watch_exit(pidfd, collect)
    await asyncio.wait({ended}, timeout=_END_SECONDS)
    return ended.result() if ended.done() else None


def start_time(pid: int) -> int | None:
    """Start time in clock ticks since boot, which identifies a process together with the pid. None if it has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def state(pid: int) -> bytes:
    """The state of a process in proc(5), such as ``T`` for a stopped one. Empty if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return b""


def has_ended(process: ProcessName) -> bool:
    """Whether the process is gone or exiting.

    The init of a PID namespace exits slowly: the kernel first kills all other processes in it and waits until their
    parents have reaped them.
    """
    try:
        with open(f"/proc/{process.pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return fields[0] in (b"Z", b"X") or int(fields[19]) != process.started or bool(int(fields[6]) & _PF_EXITING)


def open_process(pid: int, started: int | None) -> int | None:
    """A pidfd for the live process with that pid and start time (None: any). None if it is gone or has another one."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, pidfd)
        current = start_time(pid)
        if current is None or (started is not None and current != started):
            return None
        stack.pop_all()
    return pidfd


def open_namespace(pid: int, started: int, kind: str) -> int | None:
    """A descriptor of a namespace of the live process with that pid and start time. None if it is gone."""
    pidfd = open_process(pid, started)
    if pidfd is None:
        return None
    try:
        descriptor = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
        try:  # if the process still has the pid, the opened namespace is its own
            signal.pidfd_send_signal(pidfd, 0)
        except ProcessLookupError:
            os.close(descriptor)
            return None
        return descriptor
    except (FileNotFoundError, ProcessLookupError):
        return None
    finally:
        os.close(pidfd)


def kill_group(pid: int) -> None:
    """Send SIGKILL to the process group that ``pid`` leads."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def end_group(leader: int, seconds: float = 5.0) -> None:
    """Send SIGKILL to the process group that ``leader`` leads. Wait up to ``seconds`` until all of it ended. Blocks.

    A killed process may still execute a system call that creates something.
    """
    kill_group(leader)
    wait_all_ended(_members(leader), seconds)


def wait_all_ended(pids: Iterable[int], seconds: float) -> None:
    """Wait up to ``seconds`` until all these killed processes have ended. Blocks."""
    deadline = time.monotonic() + seconds
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            try:
                poller = select.poll()  # select(2) cannot watch descriptors above 1023
                poller.register(pidfd, select.POLLIN)
                poller.poll(max(0.0, deadline - time.monotonic()) * 1000)
            finally:
                os.close(pidfd)


def _members(group: int) -> list[int]:
    """The processes of a group that have not ended."""
    members = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with (
                contextlib.suppress(FileNotFoundError, ProcessLookupError),
                open(f"/proc/{entry.name}/stat", "rb") as stat,
            ):
                state, _, leader = stat.read().rpartition(b")")[2].split()[:3]
                if int(leader) == group and state not in (b"Z", b"X"):
                    members.append(int(entry.name))
    return members


class Collector:
    """Reads a pipe and keeps its bytes up to a limit. Further bytes are dropped, so that the writer never blocks.

    For ``with``. ``write_end`` is the writer's end.
    """

    def __init__(self, limit: int = OUTPUT_LIMIT) -> None:
        self.data = bytearray()
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._read_end, self.write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._read_end, False)
        self._loop.add_reader(self._read_end, self._ready)

    def _ready(self) -> None:
        if not self._pull():
            self._loop.remove_reader(self._read_end)

    def _pull(self) -> bool:
        """Read once. False at the end of the stream."""
        try:
            chunk = os.read(self._read_end, _CHUNK)
        except BlockingIOError:
            return True
        self.data += chunk[: self._limit - len(self.data)]
        return bool(chunk)

    def drain(self) -> None:
        """Read the bytes in the pipe, which are fewer than one read takes, without waiting for more."""
        self._pull()

    def close_write_end(self) -> None:
        """Close this process's copy of the write end once the writer has its own, so that the pipe ends with it."""
        if self.write_end >= 0:
            os.close(self.write_end)
            self.write_end = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.remove_reader(self._read_end)
        os.close(self._read_end)
        self.close_write_end()


async def run(
    command: Command,
    *,
    stdin: bytes = b"",
    environment: Mapping[str, str] | None = None,
    descriptors: Mapping[int, int] | None = None,
    timeout: float | None = None,
    check: bool = True,
    limit: int = OUTPUT_LIMIT,
    on_start: Callable[[int], None] | None = None,
) -> Completed:
    """Run ``command`` to its end and return its status and output. Each stream is cut at ``limit`` bytes.

    ``descriptors`` are passed in addition to the standard ones. Output that its children write after its end is not
    waited for. After ``timeout`` seconds, or when the caller is cancelled, its process group is killed and reaped.
    ``on_start`` is called with the pid right after the start.

    Raises:
        CommandError: it failed and ``check`` is set.
        DeadlineError: it took longer than ``timeout``.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    words: Sequence[str] = ()

    def made() -> Sequence[str]:
        nonlocal words
        words = command() if callable(command) else command
        return words

    with contextlib.ExitStack() as stack:
        stdout = stack.enter_context(Collector(limit))
        stderr = stack.enter_context(Collector(limit))
        with contextlib.ExitStack() as child_ends:
            child_ends.callback(stdout.close_write_end)
            child_ends.callback(stderr.close_write_end)
            mapping = {**(descriptors or {}), 1: stdout.write_end, 2: stderr.write_end}
            if stdin:
                mapping[0] = _memory_file(stdin)
                child_ends.callback(os.close, mapping[0])
            pid = await spawn_in_thread(made, environment=environment, descriptors=mapping)
        pidfd = open_child(pid)
        watch_exit(pidfd, lambda: None if ended.done() else ended.set_result(None))
        try:
            if on_start is not None:
                on_start(pid)
            async with asyncio.timeout(timeout):
                await ended
        except BaseException as error:
            loop.remove_reader(pidfd)
            await end_child(pid, pidfd)
            if isinstance(error, TimeoutError):
                raise DeadlineError(f"{words[0]} did not finish within {timeout:g} s") from error
            raise
        status = reap(pidfd)
        os.close(pidfd)
        stdout.drain()
        stderr.drain()
    completed = Completed(status if status is not None else 255, bytes(stdout.data), bytes(stderr.data))
    if check and completed.status != 0:
        raise CommandError(words, completed.status, (completed.stderr or completed.stdout).decode(errors="replace"))
    return completed


def _memory_file(content: bytes) -> int:
    descriptor = os.memfd_create("stdin")
    os.write(descriptor, content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
