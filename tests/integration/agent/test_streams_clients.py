"""kubectl's use of the streams of a real agent, in every protocol of its versions."""

from __future__ import annotations

import asyncio
import io
import os
import tarfile
from collections.abc import Awaitable, Callable

import pytest
from wsproto.events import CloseConnection

from tests.integration.agent.streams import Running, arrives, exit_code, run, spdy, spdy_in_tunnel
from tests.integration.agent.test_port_forward_streams import serving, url_of
from tests.integration.streaming.test_port_forward import open_pair, say_after_eof
from tests.integration.streaming.websocket_client import WebSocketClient
from tests.support.agent import SOON, AgentProcess
from tests.support.waiting import until

if os.geteuid() != 0:
    pytest.skip("needs root", allow_module_level=True)

TUNNEL = "SPDY/3.1+portforward.k8s.io"
Copy = Callable[[str, bytes], Awaitable[bytes]]


@pytest.fixture(params=["crun", "runc"])
def container(request: pytest.FixtureRequest, agent: AgentProcess) -> Running:
    return run(agent, handler=request.param)


@pytest.fixture
def crun(agent: AgentProcess) -> Running:
    return run(agent)


# ---- kubectl cp


async def run_over_spdy(url: str, stdin: bytes) -> bytes:
    """The output of a command that ends well, once it has had its input and the end of it."""
    async with spdy(url, "stdin", "stdout", "stderr") as (client, ids):
        await client.send(ids["stdin"], stdin, fin=True)
        assert exit_code(await client.status(ids["error"])) == 0
        await asyncio.wait_for(client.streams[ids["stdout"]].ended.wait(), SOON)
        assert await client.streams[ids["stderr"]].text() == ""
        return bytes(client.streams[ids["stdout"]].data)


async def run_over_websocket(url: str, stdin: bytes) -> bytes:
    client = await WebSocketClient.connect(url, "v5.channel.k8s.io")
    for start in range(0, len(stdin), 32_768):
        client.send(0, stdin[start : start + 32_768])
        await client.writer.drain()
    client.send(255, bytes([0]))
    assert exit_code(await client.status()) == 0
    assert client.channels.get(2, b"") == b""
    await client.close()
    return bytes(client.channels[1])


@pytest.mark.parametrize("run_command", [run_over_spdy, run_over_websocket])
async def test_files_are_copied_in_and_out_by_tar(container: Running, run_command: Copy) -> None:
    content = os.urandom(5_000_001)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        entry = tarfile.TarInfo("folder/file")
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    url = container.exec_url("tar", "-xmf", "-", "-C", "/tmp", streams="stdin stdout stderr")
    assert await run_command(url, archive.getvalue()) == b""
    url = container.exec_url("tar", "cf", "-", "-C", "/tmp", "folder", streams="stdin stdout stderr")
    with tarfile.open(fileobj=io.BytesIO(await run_command(url, b""))) as tar:
        copied = tar.extractfile("folder/file")
        assert copied is not None
        assert copied.read() == content


# ---- kubectl port-forward


async def test_a_tunnel_carries_many_connections(agent: AgentProcess, crun: Running) -> None:
    websocket = await WebSocketClient.connect(url_of(agent, crun.sandbox_id), TUNNEL)
    assert websocket.subprotocol == TUNNEL
    client = spdy_in_tunnel(websocket)

    async def one(port: int, number: int) -> None:
        data, error = await open_pair(client, port, number)
        client.send_now(data, bytes(20_000 + number), fin=True)
        assert await client.streams[data].text() == f"got {20_000 + number}"
        assert await client.streams[error].text() == ""

    async def refused(number: int) -> None:
        _, error = await open_pair(client, 9, number)
        assert "127.0.0.1: Connection refused, ::1: Connection refused" in await client.streams[error].text()

    async with serving(agent, crun.sandbox_id, say_after_eof) as port:
        await asyncio.gather(*(refused(n) if n % 10 == 0 else one(port, n) for n in range(100)))
    client.session.go_away()
    client.flush()
    await websocket.closed()
    assert websocket.close_code == 1000
    await client.close()


# ---- kubectl exec: versions, and how it is left


@pytest.mark.parametrize("version", ["v4.", "v3.", "v2.", ""])
async def test_versions_over_spdy(crun: Running, version: str) -> None:
    protocols = (f"{version}channel.k8s.io",)
    url = crun.exec_url("sh", "-c", "read line; echo got $line; echo oops >&2; exit 5", streams="stdin stdout stderr")
    async with spdy(url, "stdin", "stdout", "stderr", protocols=protocols) as (client, ids):
        assert f"X-Stream-Protocol-Version: {protocols[0]}\r\n" in client.head
        await client.send(ids["stdin"], b"line\n")
        assert await client.streams[ids["stdout"]].text() == "got line\n"
        assert await client.streams[ids["stderr"]].text() == "oops\n"
        if version == "v4.":
            assert exit_code(await client.status(ids["error"])) == 5
        else:
            assert (await client.streams[ids["error"]].text()).endswith(", exit code 5")


@pytest.mark.parametrize("protocol", ["channel.k8s.io", "base64.channel.k8s.io", "v5.base64.channel.k8s.io"])
async def test_further_versions_over_websocket(crun: Running, protocol: str) -> None:
    url = crun.exec_url("sh", "-c", "read line; echo got $line; exit 5", streams="stdin stdout")
    client = await WebSocketClient.connect(url, protocol)
    client.send(0, b"line\n")
    await client.closed()
    assert client.subprotocol == protocol
    assert client.text(1) == "got line\n"
    assert client.text(3).endswith(", exit code 5") or exit_code(await client.status()) == 5
    await client.close()


@pytest.mark.parametrize("tty", [False, True])
@pytest.mark.parametrize("politely", [True, False])
async def test_leaving_a_websocket_ends_the_whole_session(container: Running, tty: bool, politely: bool) -> None:
    script = "(trap '' HUP TERM INT; sleep 998; :) & echo ready; sleep 999"
    url = container.exec_url("sh", "-c", script, streams="stdin stdout", tty=tty)
    client = await WebSocketClient.connect(url, "v5.channel.k8s.io")
    await client.until(lambda: b"ready" in client.channels.get(1, b""))
    await until(lambda: len(container.processes()) >= 4)
    if politely:
        client.send_event(CloseConnection(code=1000))
        await client.closed()
    else:
        client.writer.transport.abort()
    await until(lambda: list(container.processes().values()) == ["sleep 1000"])
    await client.close()


async def test_a_half_closed_connection_ends_the_command(crun: Running) -> None:
    async with spdy(crun.exec_url("sh", "-c", "echo ready; sleep 999"), "stdout", "stderr") as (client, ids):
        await arrives(client, ids["stdout"], b"ready")
        client.writer.write_eof()
        await until(lambda: list(crun.processes().values()) == ["sleep 1000"])
