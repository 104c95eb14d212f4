"""Ways to the streams of a real agent's containers and pods."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from host import libc
from host.concurrency.threads import in_fresh_thread, inside_namespace
from proto.runtime.v1 import cri_pb2
from tests.integration.streaming.spdy_client import COMMAND_PROTOCOLS, SpdyClient
from tests.integration.streaming.websocket_client import TunnelEnd, WebSocketClient
from tests.support.agent import SOON, AgentProcess
from tests.support.pods import container_config, sandbox_config

SECONDS = SOON


@dataclass(frozen=True)
class Running:
    """A container that runs, and what can be asked of it."""

    agent: AgentProcess
    sandbox_id: str
    id: str

    def exec_url(self, *command: str, streams: str = "stdout stderr", tty: bool = False) -> str:
        """The URL of a command; ``streams`` are those asked for."""
        request = cri_pb2.ExecRequest(container_id=self.id, cmd=command, tty=tty, **_wanted(streams))
        return str(self.agent.client.call("Exec", request).url)

    def attach_url(self, streams: str = "stdout stderr", *, tty: bool = False) -> str:
        """The URL of the container's own streams."""
        request = cri_pb2.AttachRequest(container_id=self.id, tty=tty, **_wanted(streams))
        return str(self.agent.client.call("Attach", request).url)

    def processes(self) -> dict[int, str]:
        """The command lines of what runs in its cgroup, by the host's pids."""
        found = {}
        for pid in self._pids():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        return found

    def _pids(self) -> set[int]:
        pids: set[int] = set()
        for folder in Path("/sys/fs/cgroup").glob(f"*{self.agent.cgroup_parent}/{self.sandbox_id}/{self.id}"):
            with contextlib.suppress(FileNotFoundError):
                pids |= set(map(int, (folder / "cgroup.procs").read_text().split()))
        return pids


def _wanted(streams: str) -> dict[str, bool]:
    asked = streams.split()
    return {name: name in asked for name in ("stdin", "stdout", "stderr")}


def run(agent: AgentProcess, *command: str, handler: str = "", host_network: bool = False, **fields: Any) -> Running:
    """A separate pod with one started container."""
    config = sandbox_config(agent)
    if host_network:
        config.linux.security_context.namespace_options.network = cri_pb2.NODE
    sandbox_id = agent.client.run_sandbox(config, handler)
    container = container_config("main", *(command or ("sleep", "1000")), **fields)
    if host_network:
        container.linux.security_context.namespace_options.network = cri_pb2.NODE
    container_id = agent.client.create(sandbox_id, container, config)
    agent.client.start(container_id)
    return Running(agent, sandbox_id, container_id)


@asynccontextmanager
async def spdy(url: str, *names: str, **options: Any) -> AsyncIterator[tuple[SpdyClient, dict[str, int]]]:
    """A remote command's client with its streams open, closed after the block."""
    protocols = options.pop("protocols", COMMAND_PROTOCOLS)
    client = await SpdyClient.connect(url, protocols, **options)
    try:
        yield client, await client.open_command(*names)
    finally:
        await client.close()


def spdy_in_tunnel(websocket: WebSocketClient) -> SpdyClient:
    """A port forward's SPDY client whose bytes travel in a WebSocket's messages."""
    end = cast("Any", TunnelEnd(websocket))
    return SpdyClient(end, end, "")


def exit_code(status: dict[str, Any]) -> int:
    """The exit code in the status that ends a remote command."""
    if status["status"] == "Success":
        return 0
    assert status["reason"] == "NonZeroExitCode", status
    (cause,) = status["details"]["causes"]
    return int(cause["message"])


def resident(pid: int) -> int:
    """Bytes of memory of a process."""
    with open(f"/proc/{pid}/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


async def arrives(client: SpdyClient, stream_id: int, text: bytes) -> None:
    """Wait until ``text`` came on a stream."""
    stream = client.streams[stream_id]
    try:
        async with asyncio.timeout(SECONDS):
            while text not in stream.data:
                stream.arrived.clear()
                await stream.arrived.wait()
    except TimeoutError:
        raise AssertionError(f"{text!r} did not come, only {bytes(stream.data)!r}") from None


def resize(client: SpdyClient, stream_id: int, width: int, height: int) -> None:
    """Send the terminal's size as clients do."""
    client.send_now(stream_id, json.dumps({"Width": width, "Height": height}).encode() + b"\n")


async def listen_in_pod(agent: AgentProcess, sandbox_id: str, address: str, port: int = 0) -> socket.socket:
    """A listening socket that belongs to the pod's network."""
    pin = agent.run / "sandboxes" / sandbox_id / "ns" / "net"
    family = socket.AF_INET6 if ":" in address else socket.AF_INET

    def make() -> socket.socket:
        with inside_namespace(str(pin), libc.CLONE_NEWNET):
            return socket.create_server((address, port), family=family)

    return await in_fresh_thread(make)


def listens(container: Running) -> bool:
    """Whether a server listens at port 7000 of the pod: the kernel's state 0A."""
    tables = container.agent.client.exec(container.id, "cat", "/proc/net/tcp", "/proc/net/tcp6").stdout
    return re.search(rb":1B58 [0-9A-F]+:0000 0A ", tables) is not None
