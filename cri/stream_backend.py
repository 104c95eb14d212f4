"""The containers and pods behind the streaming server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from cri.streaming import AttachRequest, AttachSocket, ExecRequest, ProcessIO, TerminalSize, open_pipes
from cri.streaming.pod_socket import connect_to_pod
from host import processes
from host.errors import WrongStateError
from host.threads import in_thread
from runtime.agent import Agent
from runtime.exec_call import ExecCall
from runtime.sandbox import SandboxState


class ContainerTerminal(ProcessIO):
    """A terminal whose other end the OCI runtime holds, which passes it on to the one inside the container."""

    runtime_pid = 0

    def resize(self, width: int, height: int) -> None:
        """Set the size; the runtime learns of it by SIGWINCH, since the terminal does not control its session."""
        super().resize(width, height)
        if self.runtime_pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.runtime_pid, signal.SIGWINCH)


class ContainerProcess:
    """A process started in a container by the OCI runtime, which stays beside it until it ends."""

    def __init__(self, call: ExecCall, pid: int, streams: ProcessIO) -> None:
        self.io = streams
        self._call = call
        self._pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._status: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        processes.watch_exit(self._pidfd, self._ended)

    def _ended(self) -> None:
        status = processes.reap(self._pidfd)
        os.close(self._pidfd)
        self._status.set_result(255 if status is None else status)

    async def wait(self) -> int:
        """Its exit code. Raises CommandError if the runtime could not start it."""
        return self._call.exit_code(await asyncio.shield(self._status))

    async def close(self) -> None:
        """Kill it and all of its session if it runs, and wait for its end."""
        if not self._status.done():
            await in_thread(self._call.kill)
            processes.kill_group(self._pid)
            await asyncio.shield(self._status)
        self.io.close()


class NodeBackend:
    """Exec through the OCI runtime, attach through conmon, ports through the pod's network namespace."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._node = agent.node

    @asynccontextmanager
    async def exec(self, request: ExecRequest, size: TerminalSize | None) -> AsyncIterator[ContainerProcess]:
        """Start the command with the streams asked for."""
        container = self._agent.execution.running(request.container_id)
        with self._agent.execution.call(container, request.command, terminal=request.tty) as call:
            process = _on_terminal(call, request, size) if request.tty else _on_pipes(call, request)
            try:
                yield process
            finally:
                await process.close()

    @asynccontextmanager
    async def attach(self, request: AttachRequest) -> AsyncIterator[AttachSocket]:
        """Connect to the running container's console, from now on."""
        container = self._agent.execution.running(request.container_id)
        folder = self._node.layout.container(container.id).path
        console = AttachSocket.connect(folder)
        try:
            yield console
        finally:
            console.close()

    async def connect(self, sandbox_id: str, port: int) -> socket.socket:
        """A connected, non-blocking TCP socket to the port on the pod's loopback."""
        sandbox = self._node.get_sandbox(sandbox_id)
        if sandbox.record.state is not SandboxState.READY:
            raise WrongStateError(f"{sandbox.title} is not ready: nothing listens in it")
        namespace: Path | None = None if sandbox.host_network else self._node.layout.sandbox(sandbox.id).pin("net")
        return await connect_to_pod(sandbox.id, port, namespace)


def _on_pipes(call: ExecCall, request: ExecRequest) -> ContainerProcess:
    with open_pipes(stdin=request.stdin, stdout=request.stdout, stderr=request.stderr) as (streams, child_ends):
        pid = processes.spawn(call.command, descriptors={**call.descriptors, **child_ends})
        return ContainerProcess(call, pid, streams)


def _on_terminal(call: ExecCall, request: ExecRequest, size: TerminalSize | None) -> ContainerProcess:
    with contextlib.ExitStack() as undo:
        master, slave = os.openpty()
        with contextlib.closing(os.fdopen(slave, "rb+", buffering=0)):
            streams = ContainerTerminal.terminal(master, stdin=request.stdin, is_relayed=True)
            undo.callback(streams.close)
            if size is not None:
                streams.resize(size.width, size.height)
            descriptors = {**call.descriptors, 0: slave, 1: slave, 2: slave}
            streams.runtime_pid = processes.spawn(call.command, descriptors=descriptors)
        undo.pop_all()
    return ContainerProcess(call, streams.runtime_pid, streams)
