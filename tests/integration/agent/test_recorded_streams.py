"""The recorded bytes of real clients, played against a real agent: each must end as its client needs."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.agent.streams import Running, listen_in_pod, run, until
from tests.integration.streaming.player import RECORDINGS, Player, whole_input
from tests.support.agent import AgentProcess

if os.geteuid() != 0:
    pytest.skip("needs root", allow_module_level=True)


@pytest.fixture(params=["crun", "runc"])
def container(request: pytest.FixtureRequest, agent: AgentProcess) -> Running:
    return run(agent, handler=request.param)


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
    await until(lambda: b"tick" in answer.data.get(3, b"") and b"tock" in answer.data.get(5, b"") and answer.pings)
    await asyncio.to_thread(agent.client.stop, container.id)
    await playing
    assert len(answer.pings) == 124
    assert answer.status() == {"status": "Success"}


async def test_009_port_forward_confines_an_error_to_its_pair(agent: AgentProcess) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        words = (await reader.readuntil(b"\r\n\r\n")).split()
        writer.write(b"HTTP/1.0 200 OK\r\n\r\n" + words[1])
        await writer.drain()
        writer.close()

    container = run(agent)
    listener = await listen_in_pod(agent, container.sandbox_id, "127.0.0.1", 8080)
    web = await asyncio.start_server(serve, sock=listener)
    request = cri_pb2.PortForwardRequest(pod_sandbox_id=container.sandbox_id)
    player = Player("009.portforward", agent.client.call("PortForward", request).url)
    answer = await player.play(until_stream=9)
    web.close()
    assert answer.data[3] == b"HTTP/1.0 200 OK\r\n\r\n/index.html"
    assert answer.data[7] == b"HTTP/1.0 200 OK\r\n\r\n/poststart"
    assert b"127.0.0.1: Connection refused" in answer.data[9]
    assert answer.finished >= {1, 3, 5, 7, 9, 11}


@pytest.mark.parametrize("name", ["010.exec", "011.attach", "012.portforward"])
async def test_websocket_requests_of_todays_clients_are_served(agent: AgentProcess, name: str) -> None:
    container = run(agent)
    request = cri_pb2.PortForwardRequest(pod_sandbox_id=container.sandbox_id)
    url: dict[str, Callable[[], str]] = {
        "010.exec": lambda: container.exec_url("true"),
        "011.attach": container.attach_url,
        "012.portforward": lambda: str(agent.client.call("PortForward", request).url),
    }
    player = Player(name, url[name]())
    reader, writer = await asyncio.open_connection(*player.address)
    writer.write(player.head)
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    writer.close()
    offered = re.search(rb"Sec-WebSocket-Protocol: (\S+)", player.head)
    assert offered is not None
    assert head.startswith(b"HTTP/1.1 101 ")
    assert b"sec-websocket-protocol: " + offered[1].lower() in head.lower()


def test_every_recording_is_played() -> None:
    played = set(re.findall(r"\"(\d\d\d\.\w+)\"", Path(__file__).read_text()))
    assert {path.name.removesuffix(".jsonl") for path in RECORDINGS.glob("*.jsonl")} <= played
