"""Port-forward streams into pods of a real agent."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.agent.streams import listen_in_pod
from tests.integration.streaming.spdy_client import SpdyClient, request, spdy_request
from tests.integration.streaming.test_port_forward import echo, open_pair, say_after_eof
from tests.integration.streaming.websocket_client import WebSocketClient
from tests.support.agent import SOON, AgentProcess
from tests.support.pods import sandbox_config

if os.geteuid() != 0:
    pytest.skip("needs root", allow_module_level=True)

PROTOCOLS = ("portforward.k8s.io",)
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture
def pod(agent: AgentProcess) -> str:
    return agent.client.run_sandbox(sandbox_config(agent))


@pytest.fixture
async def client(agent: AgentProcess, pod: str) -> AsyncIterator[SpdyClient]:
    client = await SpdyClient.connect(url_of(agent, pod), PROTOCOLS)
    yield client
    await client.close()


def url_of(agent: AgentProcess, sandbox_id: str, *ports: int) -> str:
    answer = agent.client.call("PortForward", cri_pb2.PortForwardRequest(pod_sandbox_id=sandbox_id, port=ports))
    return str(answer.url)


@asynccontextmanager
async def serving(
    agent: AgentProcess, sandbox_id: str, serve: Serve = echo, address: str = "127.0.0.1"
) -> AsyncIterator[int]:
    """A server inside the pod; its port."""
    handlers: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.add(asyncio.ensure_future(serve(reader, writer)))

    listener = await listen_in_pod(agent, sandbox_id, address)
    server = await asyncio.start_server(accept, sock=listener, backlog=400)
    yield listener.getsockname()[1]
    # asyncio drops a connection that it accepted in the moment in which its server is closed, and leaves it open.
    asyncio.get_running_loop().remove_reader(listener.fileno())
    for _ in range(10):
        await asyncio.sleep(0)
    server.close()
    # Their sockets would keep the pod's network.
    await asyncio.wait_for(asyncio.gather(*handlers), SOON)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_the_pods_own_loopback_is_reached(
    agent: AgentProcess, pod: str, client: SpdyClient, address: str
) -> None:
    async with serving(agent, pod, address=address) as port:
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(address, port)
        data, error = await open_pair(client, port)
        payload = os.urandom(2 << 20)
        await client.send(data, payload, fin=True)
        await asyncio.wait_for(client.streams[data].ended.wait(), SOON)
        assert client.streams[data].data == payload
        assert await client.streams[error].text() == ""


async def test_ipv4_is_tried_before_ipv6(agent: AgentProcess, pod: str, client: SpdyClient) -> None:
    async def say(text: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(text)
        writer.close()

    async with serving(agent, pod, lambda reader, writer: say(b"four", writer)) as port:
        listener = await listen_in_pod(agent, pod, "::1", port)
        six = await asyncio.start_server(lambda reader, writer: say(b"six", writer), sock=listener)
        for number in range(3):
            data, _ = await open_pair(client, port, number)
            assert await client.streams[data].text() == "four"
        six.close()


async def test_a_pod_on_the_nodes_network(agent: AgentProcess) -> None:
    config = sandbox_config(agent)
    config.linux.security_context.namespace_options.network = cri_pb2.NODE
    sandbox_id = agent.client.run_sandbox(config)
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    client = await SpdyClient.connect(url_of(agent, sandbox_id), PROTOCOLS)
    data, _ = await open_pair(client, server.sockets[0].getsockname()[1])
    client.send_now(data, b"on the node", fin=True)
    assert await client.streams[data].text() == "on the node"
    await client.close()
    server.close()


async def test_a_closed_port_concerns_its_pair_only(agent: AgentProcess, pod: str, client: SpdyClient) -> None:
    async with serving(agent, pod) as port:
        first, _ = await open_pair(client, port, 0)
        client.send_now(first, b"before")
        await asyncio.wait_for(client.streams[first].arrived.wait(), SOON)
        _, error = await open_pair(client, 9, 1)
        text = await client.streams[error].text()
        assert text.startswith(f"error forwarding port 9 to pod {pod}: ")
        assert "127.0.0.1: Connection refused, ::1: Connection refused" in text
        client.send_now(first, b" and after", fin=True)
        assert await client.streams[first].text() == "before and after"


async def test_half_closes_pass(agent: AgentProcess, pod: str, client: SpdyClient) -> None:
    async with serving(agent, pod, say_after_eof) as port:
        data, error = await open_pair(client, port)
        client.send_now(data, bytes(100_000), fin=True)
        assert await client.streams[data].text() == "got 100000"
        assert await client.streams[error].text() == ""


async def test_hundreds_of_pairs_at_once(agent: AgentProcess, pod: str, client: SpdyClient) -> None:
    async def one(port: int, number: int) -> None:
        data, error = await open_pair(client, port, number)
        payload = os.urandom(5000 + number)
        client.send_now(data, payload, fin=True)
        await asyncio.wait_for(client.streams[data].ended.wait(), SOON)
        assert client.streams[data].data == payload
        assert await client.streams[error].text() == ""

    async with serving(agent, pod) as port:
        await asyncio.gather(*(one(port, number) for number in range(300)))
    assert client.session.open_streams == 0


async def test_websocket_channels(agent: AgentProcess, pod: str) -> None:
    async with serving(agent, pod) as port:
        client = await WebSocketClient.connect(url_of(agent, pod, port), "v4.channel.k8s.io")
        await client.until(lambda: len(client.messages) >= 2)
        assert client.messages[:2] == [(number, port.to_bytes(2, "little")) for number in (0, 1)]
        client.send(0, b"over channels")
        await client.until(lambda: client.channels[0][2:] == b"over channels")
        client.writer.write_eof()
        await client.close()


async def test_an_agent_that_stops_ends_the_connection(own_agent: AgentProcess) -> None:
    sandbox_id = own_agent.client.run_sandbox(sandbox_config(own_agent))
    client = await SpdyClient.connect(url_of(own_agent, sandbox_id), PROTOCOLS)
    async with serving(own_agent, sandbox_id) as port:
        data, _ = await open_pair(client, port)
        client.send_now(data, b"x")
        await asyncio.wait_for(client.streams[data].arrived.wait(), SOON)
        await asyncio.to_thread(own_agent.stop)
        await asyncio.wait_for(client.went_away.wait(), SOON)
        await asyncio.wait_for(client.closed.wait(), SOON)
    await client.close()


async def test_a_pod_that_stops_ends_its_connections(agent: AgentProcess, pod: str, client: SpdyClient) -> None:
    async with serving(agent, pod) as port:
        data, first_error = await open_pair(client, port)
        client.send_now(data, b"x")
        await asyncio.wait_for(client.streams[data].arrived.wait(), SOON)
        await asyncio.to_thread(agent.client.stop_sandbox, pod)
        await asyncio.wait_for(client.streams[data].ended.wait(), SOON)
        assert client.streams[data].reset_status is not None
        assert "ended by the node agent" in await client.streams[first_error].text()
        _, error = await open_pair(client, port, 1)
        assert "not ready" in await client.streams[error].text()


async def test_a_url_works_once(agent: AgentProcess, pod: str) -> None:
    url = url_of(agent, pod)
    client = await SpdyClient.connect(url, PROTOCOLS)
    _, writer, head = await request(url, spdy_request(url, PROTOCOLS))
    assert head.startswith("HTTP/1.1 404 ")
    writer.close()
    await client.close()
