"""The recorded bytes of real clients, played against a real agent: each must end as its client needs."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path

import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.agent.streams import Running, listen_in_pod, run, spdy_in_tunnel
from tests.integration.streaming.player import RECORDINGS, Player, whole_input
from tests.integration.streaming.test_port_forward import open_pair
from tests.integration.streaming.websocket_client import WebSocketClient
from tests.support.agent import AgentProcess
from tests.support.waiting import until

if os.geteuid() != 0:
    pytest.skip("needs root", allow_module_level=True)


@pytest.fixture(params=["crun", "runc"])
def container(request: pytest.FixtureRequest, agent: AgentProcess) -> Running:
    return run(agent, handler=request.param)


async def say_path(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one HTTP request."""
    words = (await reader.readuntil(b"\r\n\r\n")).split()
    writer.write(b"HTTP/1.0 200 OK\r\n\r\n" + words[1])
    await writer.drain()
    writer.close()


async def test_001_output_on_both_streams(container: Running) -> None:
    url = container.exec_url("sh", "-c", "echo hello; echo oops >&2")
    answer = await Player("001.exec", url).play()
    assert b"X-Stream-Protocol-Version: v4.channel.k8s.io\r\n" in answer.head
    assert (answer.data[3], answer.data[5], answer.data[1]) == (b"hello\n", b"oops\n", b'{"status":"Success"}')
    assert answer.last_good == 5


async def test_002_input_through_cat(container: Running) -> None:
    answer = await Player("002.exec", container.exec_url("cat", streams="stdin stdout stderr")).play()
    assert answer.data[5] == b"abc\ndef\n"
    assert answer.status() == {"status": "Success"}


async def test_003_exit_code(container: Running) -> None:
    answer = await Player("003.exec", container.exec_url("sh", "-c", "exit 7")).play()
    peer = (RECORDINGS / "003.exec.s2c.bin").read_bytes()
    assert answer.data[1] in peer, "the status is word for word what the peer sends"


async def test_004_missing_command(container: Running) -> None:
    answer = await Player("004.exec", container.exec_url("/no/such/thing")).play()
    status = answer.status()
    assert (status["status"], status["reason"], status["code"]) == ("Failure", "InternalError", 500)
    assert "/no/such/thing" in status["message"]


async def test_005_terminal(container: Running) -> None:
    url = container.exec_url("sh", "-c", "stty size; exit 3", streams="stdin stdout", tty=True)
    answer = await Player("005.exec", url).play()
    assert b"24 80\r\n" in answer.data[5]  # and, in any place, the echo of what the client typed
    assert answer.status()["details"] == {"causes": [{"reason": "ExitCode", "message": "3"}]}


async def test_006_three_megabytes_in(container: Running) -> None:
    url = container.exec_url("wc", "-c", streams="stdin stdout stderr")
    answer = await Player("006.exec", url, changed=whole_input("006.exec", 3, 3_000_000)).play()
    assert answer.data[5] == b"3000000\n"
    assert answer.status() == {"status": "Success"}


async def test_007_two_megabytes_out(container: Running) -> None:
    answer = await Player("007.exec", container.exec_url("head", "-c", "2000000", "/dev/zero")).play()
    assert answer.data[3] == bytes(2_000_000)
    assert answer.status() == {"status": "Success"}


async def test_008_attach(agent: AgentProcess) -> None:
    container = run(agent, "sh", "-c", "while :; do echo tick; echo tock >&2; sleep 0.1; done")
    player = Player("008.attach", container.attach_url())
    playing = asyncio.create_task(player.play())
    answer = player.answer
    await until(lambda: b"tick" in answer.data.get(3, b"") and b"tock" in answer.data.get(5, b""))
    await until(lambda: len(answer.pings) == 124)
    await asyncio.to_thread(agent.client.stop, container.id)
    await playing
    assert answer.status() == {"status": "Success"}


async def test_009_port_forward_confines_an_error_to_its_pair(agent: AgentProcess) -> None:
    container = run(agent)
    listener = await listen_in_pod(agent, container.sandbox_id, "127.0.0.1", 8080)
    web = await asyncio.start_server(say_path, sock=listener)
    request = cri_pb2.PortForwardRequest(pod_sandbox_id=container.sandbox_id)
    player = Player("009.portforward", agent.client.call("PortForward", request).url)
    answer = await player.play(until_stream=9)
    web.close()
    assert answer.data[3] == b"HTTP/1.0 200 OK\r\n\r\n/index.html"
    assert answer.data[7] == b"HTTP/1.0 200 OK\r\n\r\n/poststart"
    assert b"127.0.0.1: Connection refused" in answer.data[9]
    assert answer.finished >= {1, 3, 5, 7, 9, 11}


async def test_010_exec_over_websocket(container: Running) -> None:
    player = Player("010.exec", container.exec_url("sh", "-c", "echo hello; echo oops >&2; exit 3"))
    client = await WebSocketClient.send_recorded(player.address, player.head)
    assert client.subprotocol == "v5.channel.k8s.io"
    status = await client.status()
    assert status["details"] == {"causes": [{"reason": "ExitCode", "message": "3"}]}
    assert (client.text(1), client.text(2), client.close_code) == ("hello\n", "oops\n", 1000)
    await client.close()


async def test_011_attach_over_websocket(agent: AgentProcess) -> None:
    container = run(agent, "sh", "-c", "while :; do echo tick; echo tock >&2; sleep 0.1; done")
    player = Player("011.attach", container.attach_url())
    client = await WebSocketClient.send_recorded(player.address, player.head)
    assert client.subprotocol == "v5.channel.k8s.io"
    await client.until(lambda: b"tick" in client.channels.get(1, b"") and b"tock" in client.channels.get(2, b""))
    await asyncio.to_thread(agent.client.stop, container.id)
    assert (await client.status(), client.close_code) == ({"status": "Success"}, 1000)
    await client.close()


async def test_012_port_forward_through_a_tunnel(agent: AgentProcess) -> None:
    container = run(agent)
    request = cri_pb2.PortForwardRequest(pod_sandbox_id=container.sandbox_id)
    player = Player("012.portforward", agent.client.call("PortForward", request).url)
    websocket = await WebSocketClient.send_recorded(player.address, player.head)
    assert websocket.subprotocol == "spdy/3.1+portforward.k8s.io"
    client = spdy_in_tunnel(websocket)
    web = await asyncio.start_server(say_path, sock=await listen_in_pod(agent, container.sandbox_id, "127.0.0.1", 8080))
    data, error = await open_pair(client, 8080)
    client.send_now(data, b"GET /index.html HTTP/1.1\r\n\r\n")
    assert await client.streams[data].text() == "HTTP/1.0 200 OK\r\n\r\n/index.html"
    client.session.reset(data)  # as kubectl leaves a connection that the pod has ended
    client.flush()
    assert await client.streams[error].text() == ""
    web.close()
    await client.close()


def test_every_recording_is_played() -> None:
    played = set(re.findall(r"\"(\d\d\d\.\w+)\"", Path(__file__).read_text()))
    assert {path.name.removesuffix(".jsonl") for path in RECORDINGS.glob("*.jsonl")} <= played
