"""No client that can connect to the agent can keep other clients out, or use up its descriptors and memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.agent.streams import Running, exit_code, run, spdy, spdy_in_tunnel
from tests.integration.agent.test_port_forward_streams import serving, url_of
from tests.integration.streaming.spdy_client import SpdyClient
from tests.integration.streaming.test_port_forward import open_pair
from tests.integration.streaming.websocket_client import WebSocketClient
from tests.support.agent import AgentProcess, running_agent, wait_for
from tests.support.cri import CriClient
from tests.support.waiting import until

TUNNEL = "SPDY/3.1+portforward.k8s.io"


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Raise the test's own limit of descriptors to its maximum."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def descriptors(agent: AgentProcess) -> int:
    return sum(1 for _ in Path(f"/proc/{agent.pid()}/fd").iterdir())


def address_of(url: str) -> tuple[str, int]:
    host, port = url.split("/")[2].split(":")
    return host, int(port)


async def exec_works(container: Running) -> None:
    async with spdy(container.exec_url("true"), "stdout", "stderr") as (client, ids):
        assert exit_code(await client.status(ids["error"])) == 0


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\n\r\n", b"POST /exec/"])
async def test_idle_connections_to_the_streaming_port_do_not_prevent_an_exec(
    quiet_log: AgentProcess, many_descriptors: None, sent: bytes
) -> None:
    container = run(quiet_log)
    address = address_of(container.exec_url("true"))
    before = descriptors(quiet_log)
    with contextlib.ExitStack() as stack:
        for _ in range(2001):
            connection = await asyncio.to_thread(socket.create_connection, address)
            stack.enter_context(connection)
            with contextlib.suppress(ConnectionError):
                connection.sendall(sent)
        for _ in range(3):
            await exec_works(container)
        assert descriptors(quiet_log) < before + 300


async def test_an_agent_with_few_descriptors_keeps_serving(busybox: Path, tmp_path: Path) -> None:
    with running_agent(tmp_path, busybox) as agent:
        container = run(agent)
        address = address_of(container.exec_url("true"))
        agent.client.call("Version", cri_pb2.VersionRequest())
        limits = resource.prlimit(agent.pid(), resource.RLIMIT_NOFILE)
        resource.prlimit(agent.pid(), resource.RLIMIT_NOFILE, (descriptors(agent) + 5, limits[1]))
        size = agent.log.stat().st_size
        with contextlib.ExitStack() as stack:
            for _ in range(100):
                stack.enter_context(await asyncio.to_thread(socket.create_connection, address))
            await until(lambda: b"connections cannot be accepted" in agent.log.read_bytes()[size:])
            for _ in range(20):  # calls of connected clients are answered
                agent.client.call("Version", cri_pb2.VersionRequest())
                await asyncio.sleep(0.05)
            assert agent.log.stat().st_size - size < 4096, agent.tail()
        resource.prlimit(agent.pid(), resource.RLIMIT_NOFILE, limits)
        await exec_works(container)
        assert agent.tracebacks(size) == []


def test_silent_clients_of_the_socket_do_not_keep_others_out(quiet_log: AgentProcess, many_descriptors: None) -> None:
    path = quiet_log.address.removeprefix("unix://")
    with contextlib.ExitStack() as stack:
        for _ in range(1500):
            connection = stack.enter_context(socket.socket(socket.AF_UNIX))
            connection.settimeout(5)
            connection.connect(path)
        client = CriClient(quiet_log.address)
        stack.callback(client.close)
        client.wait_ready(20)
        client.call("Version", cri_pb2.VersionRequest())


def test_clients_that_keep_their_connections_do_not_keep_others_out(
    quiet_log: AgentProcess, many_descriptors: None
) -> None:
    """They have sent HTTP/2 messages, so that only a minute without calls would end them."""
    path = quiet_log.address.removeprefix("unix://")
    size = quiet_log.log.stat().st_size
    with contextlib.ExitStack() as stack:
        for _ in range(1050):
            connection = stack.enter_context(socket.socket(socket.AF_UNIX))
            connection.settimeout(5)
            connection.connect(path)
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))
        for _ in range(3):
            client = CriClient(quiet_log.address)
            stack.callback(client.close)
            client.wait_ready(20)
            client.call("Version", cri_pb2.VersionRequest())
        lines = quiet_log.log.read_bytes()[size:].decode()
        assert f"process {os.getpid()} had" in lines, lines
        assert "oldest were closed" in lines
    quiet_log.client.wait_ready(20)


def subscribe(agent: AgentProcess) -> Any:
    return agent.client.stream("GetContainerEvents", cri_pb2.GetEventsRequest(), None)


def test_subscribers_to_events_are_limited(quiet_log: AgentProcess) -> None:
    streams = [subscribe(quiet_log) for _ in range(110)]
    try:
        wait_for(lambda: sum(stream.done() for stream in streams) >= 10, what="refusals")
        refused = [stream for stream in streams if stream.done()]
        assert {stream.code() for stream in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        quiet_log.client.call("Version", cri_pb2.VersionRequest())
    finally:
        for stream in streams:
            stream.cancel()

    def subscribed() -> bool:
        again = subscribe(quiet_log)
        again.initial_metadata()
        works = not again.done()
        again.cancel()
        return bool(works)

    wait_for(subscribed, what="room for a new subscriber")


async def test_clients_attached_to_one_container_are_limited(quiet_log: AgentProcess) -> None:
    container = run(quiet_log, "sh", "-c", "while :; do echo out; sleep 0.2; done")
    clients = [await SpdyClient.connect(container.attach_url("stdout")) for _ in range(105)]
    streams = [await client.open_command("stdout") for client in clients]
    # They are served at the same time, so the test does not know which of them are refused.
    waiting = [asyncio.create_task(one.status(ids["error"])) for one, ids in zip(clients, streams, strict=True)]
    await until(lambda: sum(task.done() for task in waiting) >= 5, "the refusal of five clients")
    refused = [task.result()["message"] for task in waiting if task.done()]
    assert len(refused) == 5
    assert all("has 100 clients attached already" in message for message in refused)
    for task in waiting:
        task.cancel()
    outputs = [one.streams[ids["stdout"]] for one, ids in zip(clients, streams, strict=True)]
    await until(lambda: sum(bool(output.data) for output in outputs) == 100, "output at the others")
    for client in clients:
        await client.close()


# ---- disconnecting


Leave = Callable[[asyncio.StreamWriter], None]


def reset(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def half_close(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").shutdown(socket.SHUT_WR)


def half_close_and_reset(writer: asyncio.StreamWriter) -> None:
    half_close(writer)
    reset(writer)


def vanish_within_a_frame(writer: asyncio.StreamWriter) -> None:
    writer.write(bytes.fromhex("8003000100ffffff00"))
    reset(writer)


def close(writer: asyncio.StreamWriter) -> None:
    writer.close()


WAYS: list[Leave] = [reset, half_close, half_close_and_reset, vanish_within_a_frame, close]
OUTPUT = ("sh", "-c", "while :; do echo output; done")


async def leave_spdy(container: Running, leave: Leave) -> None:
    for names in ((), ("stdout",), ("stdout", "stderr")):  # before the command starts, or during its output
        for url in (container.exec_url(*OUTPUT), container.exec_url("true"), container.attach_url()):
            client = await SpdyClient.connect(url)
            await client.open_command(*names)
            leave(client.writer)
            await client.close()


async def leave_websocket(container: Running, leave: Leave) -> None:
    for url in (container.exec_url(*OUTPUT), container.exec_url("true"), container.attach_url()):
        client = await WebSocketClient.connect(url, "v5.channel.k8s.io")
        leave(client.writer)
        await client.close()


async def leave_port_forward(container: Running, leave: Leave) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(bytes(100_000))
                await writer.drain()
        writer.close()

    async with serving(container.agent, container.sandbox_id, talk) as port:
        direct = await SpdyClient.connect(url_of(container.agent, container.sandbox_id), ("portforward.k8s.io",))
        await open_pair(direct, port, 1)
        leave(direct.writer)
        await direct.close()
        websocket = await WebSocketClient.connect(url_of(container.agent, container.sandbox_id), TUNNEL)
        tunnel = spdy_in_tunnel(websocket)
        await open_pair(tunnel, port, 1)
        leave(websocket.writer)
        await tunnel.close()
        channels = await WebSocketClient.connect(
            url_of(container.agent, container.sandbox_id, port), "v4.channel.k8s.io", query=f"?port={port}"
        )
        leave(channels.writer)
        await channels.close()


@pytest.mark.parametrize("leave", WAYS)
async def test_clients_that_disconnect_in_any_way_cause_no_traceback(quiet_log: AgentProcess, leave: Leave) -> None:
    container = run(quiet_log, "sh", "-c", "while :; do echo output; sleep 0.01; done")
    await exec_works(container)  # opens everything that the agent opens only once
    before = descriptors(quiet_log)
    await asyncio.gather(
        *(protocol(container, leave) for protocol in (leave_spdy, leave_websocket, leave_port_forward) for _ in "123")
    )
    await until(lambda: descriptors(quiet_log) <= before, "the end of all connections")
    await until(lambda: len(container.processes()) <= 2, "the end of all commands")
    await exec_works(container)
