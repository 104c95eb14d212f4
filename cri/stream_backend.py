"""The containers and pods behind the streaming server."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from cri.streaming.attach_socket import AttachSocket
from cri.streaming.backend import TerminalSize
from cri.streaming.pod_socket import connect_to_pod
from cri.streaming.process_io import ProcessIO, open_pipes
from cri.streaming.tokens import AttachRequest, ExecRequest
from host.errors import LimitError, WrongStateError
from host.files import descriptors
from runtime.agent import Agent
from runtime.oci.exec_call import ExecCall, ExecProcess
from runtime.specgen.config import ConsoleSize
from runtime.state.sandbox import SandboxState

# The most clients attached to one container: its conmon needs a descriptor for each, and others for its own work.
ATTACH_LIMIT = 100


@dataclass(frozen=True, slots=True)
class ContainerProcess:
    """A process in a container, with the agent's ends of its streams."""

    process: ExecProcess
    io: ProcessIO

    async def wait(self) -> int:
        """Its exit code once it has ended, 128 + n after signal n."""
        return await asyncio.shield(self.process.ended)


class NodeBackend:
    """Exec through the OCI runtime, attach through conmon, ports through the pod's network namespace."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    @asynccontextmanager
    async def exec(self, request: ExecRequest, size: TerminalSize | None) -> AsyncIterator[ContainerProcess]:
        """Start the command with the streams asked for."""
        container = self._agent.state.running_container(request.container_id)
        descriptors.require(f"exec in {container.title}")
        console_size = ConsoleSize(height=size.height, width=size.width) if size is not None else None
        with await self._agent.execution.call(
            container, request.command, terminal=request.tty, size=console_size
        ) as call:
            streams = await _launch(call, request)
            try:
                async with call.process() as process:
                    if call.console is not None:
                        streams = ProcessIO.terminal(call.console.terminal(), stdin=request.stdin)
                    yield ContainerProcess(process, streams)
            finally:
                streams.close()

    @asynccontextmanager
    async def attach(self, request: AttachRequest) -> AsyncIterator[AttachSocket]:
        """Connect to the running container's console, from now on."""
        container = self._agent.state.running_container(request.container_id)
        descriptors.require(f"attach to {container.title}")
        folder = container.folder.path
        if container.attached >= ATTACH_LIMIT:
            raise LimitError(f"{container.title} has {ATTACH_LIMIT} clients attached already: end one of them")
        container.attached += 1
        try:
            console = await AttachSocket.connect(folder)
            try:
                yield console
            finally:
                console.close()
        finally:
            container.attached -= 1

    async def connect(self, sandbox_id: str, port: int) -> socket.socket:
        """A connected, non-blocking TCP socket to the port on the pod's loopback.

        The calling task is cancelled when the pod stops.
        """
        sandbox = self._agent.state.get_sandbox(sandbox_id)
        if sandbox.record.state is not SandboxState.READY:
            raise WrongStateError(f"{sandbox.title} is not ready: nothing listens in it")
        descriptors.require(f"port-forward to {sandbox.title}")
        sandbox.add_port_forward()
        namespace: Path | None = None if sandbox.host_network else sandbox.folder.pin("net")
        return await connect_to_pod(sandbox.id, port, namespace)


async def _launch(call: ExecCall, request: ExecRequest) -> ProcessIO:
    """Start it; our ends of its pipes, none yet of a terminal."""
    if call.console is not None:
        await call.launch({})
        return ProcessIO()
    with open_pipes(stdin=request.stdin, stdout=request.stdout, stderr=request.stderr) as (streams, child_ends):
        await call.launch(child_ends)
        return streams
