"""Commands run inside containers, and changes to running ones: exec, limits, log rotation."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from host import processes
from host.concurrency.abandonable import AbandonableThreads
from host.concurrency.threads import acquired, in_fresh_thread
from host.errors import (
    DeadlineError,
    InvalidArgumentError,
    PermissionDeniedError,
    PodkeelError,
    WrongStateError,
)
from host.files.inotify import wait_for_entries
from host.processes import ProcessName
from proto.runtime.v1 import cri_pb2
from runtime.cgroups.tree import CgroupTree
from runtime.containers.limits import Limits, require_alive
from runtime.hooks import Hooks
from runtime.logs import LogFile, LogLink, append_from_now_on, has_open
from runtime.oci.conmon import Monitors
from runtime.oci.directory_probe import DIRECTORY_BY_DESCRIPTOR
from runtime.oci.exec_call import ExecCall
from runtime.oci.handlers import Handlers
from runtime.oci.oci_runtime import OciRuntime
from runtime.oci.working_directory import WorkingDirectory, working_directory
from runtime.specgen import config
from runtime.specgen.limits.extra_limits import LimitChange
from runtime.specgen.limits.resources import oom_score_adj
from runtime.specgen.node_facts import NodeFacts
from runtime.state.container import Container, ContainerState
from runtime.state.state import State

REOPEN_SECONDS = 5.0
# How long conmon takes at most, while it runs, from reading that it is to open its log to opening it.
_TAKING_SECONDS = 0.5
_MOST_HANGING = 64  # threads that wait for working directories on volumes, of commands that were given up

_log = logging.getLogger("podkeel.containers")


class _SpecProcess(msgspec.Struct):
    process: config.Process


_decode_spec = msgspec.json.Decoder(_SpecProcess).decode


class ContainerExec:
    """Acts on containers that are there already."""

    def __init__(
        self,
        *,
        state: State,
        handlers: Handlers,
        monitors: Monitors,
        cgroups: CgroupTree,
        facts: NodeFacts,
        pids_limit: int,
        hooks: Hooks,
    ) -> None:
        self._state = state
        self._handlers = handlers
        self._monitors = monitors
        self._cgroups = cgroups
        self._facts = facts
        self._hooks = hooks
        self._threads = AbandonableThreads(_MOST_HANGING)
        self.limits = Limits(state, handlers, cgroups, facts, pids_limit)

    async def exec_sync(self, container_id: str, command: Sequence[str], timeout: float) -> processes.Completed:
        """Run a command to its end and return its output, cut at 16 MiB a stream; ``timeout`` 0 means none.

        Raises:
            NotFoundError, WrongStateError: there is no such container, or it does not run.
            DeadlineError: the command took too long; it and its children were killed.
            CommandError: it could not be started.
        """
        container = self.running(container_id)
        if not command:
            raise InvalidArgumentError(f"{container.title}: no command to execute was given")
        if timeout < 0:
            raise InvalidArgumentError(f"{container.title}: the timeout {timeout:g} s is negative: use 0 for none")
        with self.call(container, command) as call:
            return await _run_to_end(call, command[0], timeout)

    def call(
        self,
        container: Container,
        command: Sequence[str],
        *,
        terminal: bool = False,
        size: config.ConsoleSize | None = None,
    ) -> ExecCall:
        """The OCI runtime's exec of ``command`` in a container that runs, on a terminal of that size if wanted.

        Raises WrongStateError for a frozen container, in which the OCI runtime would be frozen too.
        """
        if self._cgroups.is_frozen(container.record.cgroup):
            raise WrongStateError(f"{container.title} is frozen: thaw its cgroup before anything is executed in it")
        runtime = self._handlers.get(container.record.handler)
        process = self._process(container, command)
        process.terminal = terminal
        process.console_size = size
        process.oom_score_adj = self._decided_score(container)
        directory = self._checked_directory(container, runtime, process)
        if directory is not None:
            process.cwd = DIRECTORY_BY_DESCRIPTOR
        late = size is not None and runtime.features.is_crun  # it sets the size when the command may already run
        return ExecCall(
            runtime=runtime,
            container_id=container.id,
            folder=container.folder.path,
            program=command[0],
            process=msgspec.json.encode(process),
            pids=partial(self._cgroups.processes, container.record.cgroup),
            terminal=terminal,
            directory=directory,
            oom_score_adj=process.oom_score_adj,
            held_at=container.folder.rootfs if late else None,
        )

    def _decided_score(self, container: Container) -> int:
        """The oom_score_adj of what runs in a container, as it was last configured."""
        limits = cri_pb2.LinuxContainerResources.FromString(container.record.resources)
        return oom_score_adj(limits, self._facts)

    def _process(self, container: Container, command: Sequence[str]) -> config.Process:
        """The OCI ``process`` object of a further command in a container: like its first one, except
        for the arguments.
        """
        process = _decode_spec(container.folder.spec.read_bytes()).process
        process.args = list(command)
        return process

    def _checked_directory(
        self, container: Container, runtime: OciRuntime, process: config.Process
    ) -> WorkingDirectory | None:
        """The working directory that the agent must open, as the OCI runtime does not check where it leads.

        Raises PermissionDeniedError for a container that sees processes of others, if the OCI runtime accepts no
        descriptor: a link through such a process leads out of the container.
        """
        record, behaviour = container.record, runtime.directories
        if behaviour.refuses_outside or process.cwd == "/" or record.init is None:
            return None
        if behaviour.enters_descriptors:
            process.args[0] = _found_from(process.cwd, process.args[0])
            return working_directory(container, record.init, process, self._threads)
        if self._sees_others(container):
            raise PermissionDeniedError(
                f"{container.title}: it sees processes of others, and its runtime handler {runtime.name!r} "
                f"({runtime.features.version}) could be led out of it by links in its working directory "
                f"{process.cwd}: install crun 1.14.1, runc 1.1.12 or newer ones, or make / its working directory"
            )
        return None

    def _sees_others(self, container: Container) -> bool:
        if not container.record.private_pid_namespace:
            return True
        targets = (
            c.config.linux.security_context.namespace_options for c in self._state.containers_of(container.sandbox)
        )
        return any(options.pid == cri_pb2.TARGET for options in targets)

    async def update(self, container_id: str, given: cri_pb2.LinuxContainerResources) -> None:
        """Change a container's limits, all of them or none; fields left at 0 stay as they are.

        Raises:
            WrongStateError: the container has exited.
            LimitError: the memory limit would be below what the container uses now.
            PodkeelError: a plugin of the node refuses.
        """
        container, hooks = self._state.get_container(container_id), self._hooks
        try:
            async with container.lock:
                require_alive(container)
                operation = container.begin("UpdateContainerResources")
                async with hooks.passing():
                    change = await hooks.update_container(container, given, operation)
                await self.limits.change(container, change, operation)
                async with hooks.passing():
                    await hooks.updated_container(container, operation)
        finally:
            await hooks.carry_out(container)

    async def apply(self, container: Container, change: LimitChange) -> None:
        """The same for a plugin: no plugin is notified."""
        async with container.lock:
            await self.limits.change(container, change, container.begin("UpdateContainerResources"))

    async def reopen_log(self, container_id: str) -> None:
        """Have the log written to a new file after the old one was renamed; nothing if it was not.

        After any failure the old log is still used.

        Raises:
            WrongStateError: the container does not run, has no log, or another file with content took the log's place.
            InvalidArgumentError: the log's place is taken, or a link leads from it out of the pod's log folder.
            LimitError: the file system is full.
        """
        container = self.running(container_id)
        if container.log is None:
            raise WrongStateError(f"{container.title} has no log: its log_path is empty")
        async with container.log_lock:
            descriptor = await acquired(in_fresh_thread, container.log.open, os.close)
            try:
                await self._write_log_to(container, descriptor)
            finally:
                os.close(descriptor)

    async def _write_log_to(self, container: Container, descriptor: int) -> None:
        monitor, log = container.record.monitor, container.log
        assert log is not None
        if monitor is None:
            raise WrongStateError(f"{container.title}: its conmon was killed: nothing writes its log any more")
        if await in_fresh_thread(has_open, monitor, descriptor):
            await in_fresh_thread(append_from_now_on, monitor, descriptor)
            return
        size = os.fstat(descriptor).st_size
        if size:
            raise WrongStateError(f"log {log.path} is another file now, with {size} bytes: rename it first")
        try:
            opened = await self._open_next(container, monitor, log, descriptor)
        except OSError as error:
            log.path.unlink(missing_ok=True)
            raise PodkeelError(f"{container.title}: its conmon cannot be reached: {error.strerror}") from error
        if not opened:
            raise PodkeelError(f"{container.title}: its conmon did not open {log.path} within {REOPEN_SECONDS:g} s")

    async def _open_next(self, container: Container, monitor: ProcessName, log: LogFile, descriptor: int) -> bool:
        """Have conmon open the new, empty file of ``descriptor``; whether it does so in time."""
        reopen = self._monitors.reopen_log
        link = LogLink(container.folder.path)
        if not link.is_used:  # its conmon was started by an older version: it knows the path itself
            next_log = LogFile(log.folder, Path(f"{log.path}.tmp"))
            descriptor = await acquired(in_fresh_thread, next_log.open, os.close)
            try:
                reopen(container.id)
                opened = await wait_for_entries(log.path.parent, lambda: has_open(monitor, descriptor), REOPEN_SECONDS)
                await in_fresh_thread(append_from_now_on, monitor, descriptor)
            finally:
                os.close(descriptor)
            return opened
        monitors, folder = self._monitors, link.path.parent
        told = link.waiting() is not None and monitors.has_unread(container.id)
        if link.waiting() is not None and not told:  # it is about to open it, or the agent that would ask it died
            await wait_for_entries(folder, lambda: link.waiting() is None, _TAKING_SECONDS)
            if await in_fresh_thread(has_open, monitor, descriptor):
                await in_fresh_thread(append_from_now_on, monitor, descriptor)
                return True
        bound = await in_fresh_thread(_lead_next_to, link, monitor, descriptor, partial(reopen, container.id), told)
        opened = await wait_for_entries(folder, lambda: link.leads_to(bound), REOPEN_SECONDS)
        if opened:
            await in_fresh_thread(append_from_now_on, monitor, descriptor)
            await in_fresh_thread(link.release)
        return opened  # if not it may yet do so: the file must be there then, else it ends

    def running(self, container_id: str) -> Container:
        """The container, which runs. Raises NotFoundError or WrongStateError."""
        container = self._state.get_container(container_id)
        if container.record.state is not ContainerState.RUNNING:
            raise WrongStateError(f"{container.title} is {container.record.state}, not running")
        return container


def _lead_next_to(link: LogLink, monitor: ProcessName, descriptor: int, tell: Callable[[], None], told: bool) -> Path:
    """Have conmon open the new, empty file of ``descriptor``; returns where that is bound.

    conmon must be asked only once, and ``told`` says that a request waits: at a second one it would find nothing to
    open.
    """
    late = link.open_waiting() if told else None
    try:
        waiting = link.waiting()
        if late is not None and waiting is not None and os.path.sameopenfile(late, descriptor):
            return waiting
        bound = link.bind_next(descriptor)
        link.lead_next_to(bound)
        came = late is not None and has_open(monitor, late)  # just before, and it may have renamed the new link
        if came:
            link.lead_next_to(bound)
        if came or not told:
            tell()
        link.release(but=bound)
        return bound
    finally:
        if late is not None:
            os.close(late)


def _found_from(directory: str, program: str) -> str:
    """``program`` as it is found from ``directory``; a script's interpreter opens it by this path later."""
    relative = program.startswith(".") or ("/" in program and not program.startswith("/"))
    return f"{directory}/{program}" if relative else program


async def _run_to_end(call: ExecCall, program: str, timeout: float) -> processes.Completed:
    """Run ``call`` and gather its output; cancelled or past ``timeout`` (0: none), all that it started is ended."""
    with processes.Collector() as stdout, processes.Collector() as stderr:
        await call.launch({1: stdout.write_end, 2: stderr.write_end})
        stdout.close_write_end()
        stderr.close_write_end()
        try:
            async with asyncio.timeout(timeout or None), call.process() as process:
                code = await asyncio.shield(process.ended)
        except TimeoutError as error:
            raise DeadlineError(f"{program} did not finish within {timeout:g} s") from error
        stdout.drain()
        stderr.drain()
        return processes.Completed(code, bytes(stdout.data), bytes(stderr.data))
