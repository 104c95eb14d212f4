"""A backend whose containers are plain processes of this machine, and whose pods are this machine's loopback."""

from __future__ import annotations

import asyncio
import os
import socket
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from cri.streaming.attach_socket import AttachSocket
from cri.streaming.backend import TerminalSize
from cri.streaming.pod_socket import connect_to_pod
from cri.streaming.process_io import ProcessIO, open_pipes
from cri.streaming.tokens import AttachRequest, ExecRequest
from host import processes
from host.children.reaping import reap
from host.errors import CommandError, NotFoundError, PodkeelError, WrongStateError


class LocalProcess:
    """A process with our ends of its streams."""

    def __init__(self, pid: int, streams: ProcessIO) -> None:
        self.pid = pid
        self.io = streams
        self.failure: PodkeelError | None = None
        self._pidfd = os.pidfd_open(pid)
        self._code: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        processes.watch_exit(self._pidfd, self._ended)

    def _ended(self) -> None:
        status = reap(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        self._code.set_result(255 if status is None else status if status >= 0 else 128 - status)

    async def wait(self) -> int:
        code = await asyncio.shield(self._code)
        if self.failure is not None:
            raise self.failure
        return code

    async def close(self) -> None:
        processes.kill_group(self.pid)
        await asyncio.shield(self._code)
        self.io.close()


class LocalBackend:
    """Counts what it started, so that tests can see that nothing is left."""

    def __init__(self) -> None:
        self.running: set[int] = set()
        self.started = 0
        self.sizes: list[TerminalSize | None] = []
        self.attach_folder: Path | None = None
        self.namespace: Path | None = None
        self.ports: dict[int, int] = {}

    @asynccontextmanager
    async def exec(self, request: ExecRequest, size: TerminalSize | None) -> AsyncIterator[LocalProcess]:
        if request.container_id == "stopped":
            raise WrongStateError("container stopped is not running")
        self.sizes.append(size)
        try:
            process = self._on_terminal(request, size) if request.tty else self._on_pipes(request)
        except NotFoundError as error:
            raise NotFoundError(f'exec: "{request.command[0]}": no such file or directory') from error
        if request.container_id == "unstartable":
            process.failure = CommandError(["runc", "exec"], 255, "exec failed: permission denied")
        self.running.add(process.pid)
        self.started += 1
        try:
            yield process
        finally:
            await process.close()
            self.running.discard(process.pid)

    def _on_pipes(self, request: ExecRequest) -> LocalProcess:
        with open_pipes(stdin=request.stdin, stdout=request.stdout, stderr=request.stderr) as (streams, child):
            return LocalProcess(processes.spawn(request.command, descriptors=child), streams)

    def _on_terminal(self, request: ExecRequest, size: TerminalSize | None) -> LocalProcess:
        master, slave = os.openpty()
        if size is not None:
            termios.tcsetwinsize(slave, (size.height, size.width))
        command = ("setsid", "-w", "-c", *request.command)
        try:
            pid = processes.spawn(command, descriptors={0: slave, 1: slave, 2: slave})
        finally:
            os.close(slave)
        return LocalProcess(pid, ProcessIO.terminal(master, stdin=request.stdin))

    @asynccontextmanager
    async def attach(self, request: AttachRequest) -> AsyncIterator[AttachSocket]:
        if self.attach_folder is None:
            raise WrongStateError(f"container {request.container_id} is not running")
        console = await AttachSocket.connect(self.attach_folder)
        try:
            yield console
        finally:
            console.close()

    async def connect(self, sandbox_id: str, port: int) -> socket.socket:
        return await connect_to_pod(sandbox_id, self.ports.get(port, port), self.namespace)
