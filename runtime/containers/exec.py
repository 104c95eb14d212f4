"""Runs commands in containers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec

from host import processes
from host.concurrency.abandonable import AbandonableThreads
from host.concurrency.threads import in_thread
from host.errors import (
    DeadlineError,
    InvalidArgumentError,
    PermissionDeniedError,
    WrongStateError,
)
from proto.runtime.v1 import cri_pb2
from runtime.cgroups.tree import CgroupTree
from runtime.oci.directory_probe import DIRECTORY_BY_DESCRIPTOR
from runtime.oci.exec_call import ExecCall
from runtime.oci.handlers import Handlers
from runtime.oci.oci_runtime import OciRuntime
from runtime.oci.working_directory import WorkingDirectory, working_directory
from runtime.specgen import config
from runtime.specgen.limits.resources import oom_score_adj
from runtime.specgen.node_facts import NodeFacts
from runtime.specgen.process import refuse_nul
from runtime.state.container import Container
from runtime.state.state import State

_MAX_HANGING = 64  # threads that wait for working directories on volumes, of commands that were cancelled


class _SpecProcess(msgspec.Struct):
    process: msgspec.Raw


_decode_spec = msgspec.json.Decoder(_SpecProcess).decode
_decode_process = msgspec.json.Decoder(config.Process).decode


class ContainerExec:
    """Runs commands in containers."""

    def __init__(self, state: State, handlers: Handlers, cgroups: CgroupTree, facts: NodeFacts) -> None:
        self._state = state
        self._handlers = handlers
        self._cgroups = cgroups
        self._facts = facts
        self._threads = AbandonableThreads(_MAX_HANGING)

    async def exec_sync(self, container_id: str, command: Sequence[str], timeout: float) -> processes.Completed:
        """Run a command to its end and return its output, cut at 16 MiB for each stream. ``timeout`` 0 is no limit.

        Raises:
            NotFoundError, WrongStateError: there is no such container, or it does not run.
            DeadlineError: the command took too long; it and its children were killed.
            CommandError: it could not be started.
        """
        container = self._state.running_container(container_id)
        if not command:
            raise InvalidArgumentError(f"{container.title}: no command to execute was given")
        if timeout < 0:
            raise InvalidArgumentError(f"{container.title}: the timeout {timeout:g} s is negative: use 0 for no limit")
        with await self.call(container, command) as call:
            return await _run_to_end(call, command[0], timeout)

    async def call(
        self,
        container: Container,
        command: Sequence[str],
        *,
        terminal: bool = False,
        size: config.ConsoleSize | None = None,
    ) -> ExecCall:
        """The OCI runtime's exec of ``command`` in a running container, with a terminal of that size if requested.

        Raises WrongStateError for a frozen container, in which the OCI runtime would be frozen too.
        """
        if container.process is None:
            try:
                container.process = await in_thread(_read_process, container.folder.spec)
            finally:
                self._state.running_container(container.id)  # raises if it ended meanwhile
        if self._cgroups.is_frozen(container.record.cgroup):
            raise WrongStateError(f"{container.title} is frozen: thaw its cgroup before anything is executed in it")
        runtime = self._handlers.get(container.record.handler)
        process = _process(container, container.process, command)
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
            init=container.record.init,
            terminal=terminal,
            directory=directory,
            oom_score_adj=process.oom_score_adj,
            held_at=container.folder.rootfs if late else None,
        )

    def _decided_score(self, container: Container) -> int:
        """The last configured oom_score_adj of a container's processes."""
        limits = cri_pb2.LinuxContainerResources.FromString(container.record.resources)
        return oom_score_adj(limits, self._facts)

    def _checked_directory(
        self, container: Container, runtime: OciRuntime, process: config.Process
    ) -> WorkingDirectory | None:
        """The working directory that the agent must open, because the OCI runtime does not check where it leads.

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


def _found_from(directory: str, program: str) -> str:
    """The path of ``program`` from ``directory``. A script's interpreter opens the script by this path later."""
    relative = program.startswith(".") or ("/" in program and not program.startswith("/"))
    return f"{directory}/{program}" if relative else program


async def _run_to_end(call: ExecCall, program: str, timeout: float) -> processes.Completed:
    """Run ``call`` and collect its output. If cancelled or after ``timeout`` (0: none), kill all that it started."""
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


def _read_process(spec: Path) -> bytes:
    """The ``process`` object of a container's spec. Blocks."""
    return bytes(_decode_spec(spec.read_bytes()).process)


def _process(container: Container, of_spec: bytes, command: Sequence[str]) -> config.Process:
    """The OCI ``process`` object of a command: that of the container's first process, except for the arguments."""
    process = _decode_process(of_spec)
    for word in command:
        refuse_nul(word, f"{container.title}: the command")
    process.args = list(command)
    return process
