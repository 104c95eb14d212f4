"""The recorded bytes of real clients, played against the server: each must end as its client needs."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from cri.streaming.server import StreamingServer
from tests.integration.streaming.local_backend import LocalBackend
from tests.integration.streaming.player import RECORDINGS, Player, whole_input
from tests.support.agent import SOON
from tests.support.ports import free_port


async def test_001_output_on_both_streams(server: StreamingServer) -> None:
    command = ["sh", "-c", "echo hello; echo oops >&2"]
    url = server.exec_url("c", command, tty=False, stdin=False, stdout=True, stderr=True)
    answer = await Player("001.exec", url).play()
    assert answer.head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
    assert b"X-Stream-Protocol-Version: v4.channel.k8s.io\r\n" in answer.head
    assert answer.replies == {1, 3, 5}
    assert (answer.data[3], answer.data[5]) == (b"hello\n", b"oops\n")
    assert answer.finished >= {3, 5}
    assert answer.data[1] == b'{"status":"Success"}'
    assert answer.last_good == 5


async def test_002_input_through_cat(server: StreamingServer) -> None:
    url = server.exec_url("c", ["cat"], tty=False, stdin=True, stdout=True, stderr=True)
    answer = await Player("002.exec", url).play()
    assert answer.data[5] == b"abc\ndef\n"
    assert answer.status() == {"status": "Success"}
    assert answer.last_good == 7


async def test_003_exit_code(server: StreamingServer) -> None:
    url = server.exec_url("c", ["sh", "-c", "exit 7"], tty=False, stdin=False, stdout=True, stderr=True)
    answer = await Player("003.exec", url).play()
    peer = (RECORDINGS / "003.exec.s2c.bin").read_bytes()
    assert answer.data[1] in peer, "the status is word for word what the peer sends"


async def test_004_missing_command(server: StreamingServer) -> None:
    url = server.exec_url("c", ["/no/such/thing"], tty=False, stdin=False, stdout=True, stderr=True)
    answer = await Player("004.exec", url).play()
    status = answer.status()
    assert (status["status"], status["reason"], status["code"]) == ("Failure", "InternalError", 500)
    assert status["message"].startswith("Internal error occurred: error executing command in container: ")
    assert answer.last_good == 5


async def test_005_terminal(server: StreamingServer) -> None:
    url = server.exec_url("c", ["sh", "-c", "stty size; exit 3"], tty=True, stdin=True, stdout=True, stderr=False)
    answer = await Player("005.exec", url).play()
    assert answer.replies == {1, 3, 5, 7}
    assert b"24 80\r\n" in answer.data[5]
    assert answer.status()["details"] == {"causes": [{"reason": "ExitCode", "message": "3"}]}


async def test_006_three_megabytes_in(server: StreamingServer) -> None:
    changed = whole_input("006.exec", 3, 3_000_000)
    url = server.exec_url("c", ["wc", "-c"], tty=False, stdin=True, stdout=True, stderr=True)
    answer = await Player("006.exec", url, changed=changed).play()
    assert answer.data[5] == b"3000000\n"
    assert answer.status() == {"status": "Success"}


async def test_007_two_megabytes_out_to_a_client_that_never_grants_windows(server: StreamingServer) -> None:
    url = server.exec_url("c", ["head", "-c", "2000000", "/dev/zero"], tty=False, stdin=False, stdout=True, stderr=True)
    answer = await Player("007.exec", url).play()
    assert len(answer.data[3]) == 2_000_000
    assert answer.status() == {"status": "Success"}


async def test_008_attach(server: StreamingServer, console: Console) -> None:
    url = server.attach_url("c", stdin=False, tty=False, stdout=True, stderr=True)
    answer = await Player("008.attach", url).play(until_stream=None)
    assert answer.data[3].startswith(b"tick 0\ntick 1\n")
    assert answer.data[5] == b"tock\n"
    assert answer.pings[:3] == [1, 3, 5]
    assert len(answer.pings) == 124
    assert answer.status() == {"status": "Success"}


async def test_009_port_forward_confines_an_error_to_its_pair(server: StreamingServer, backend: LocalBackend) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 200 OK\r\n\r\n" + request.split()[1])
        await writer.drain()
        writer.close()

    web = await asyncio.start_server(serve, "127.0.0.1", 0)
    closed_port = free_port()
    backend.ports = {8080: web.sockets[0].getsockname()[1], 9: closed_port}
    answer = await Player("009.portforward", server.port_forward_url("pod", [])).play(until_stream=9)
    web.close()
    assert answer.replies == {1, 3, 5, 7, 9, 11}
    assert answer.data[3] == b"HTTP/1.0 200 OK\r\n\r\n/index.html"
    assert answer.data[7] == b"HTTP/1.0 200 OK\r\n\r\n/poststart"
    assert answer.data[9].startswith(b"error forwarding port 9 to pod pod: ")
    assert b"127.0.0.1: Connection refused" in answer.data[9]
    assert answer.finished >= {1, 3, 5, 7, 9, 11}


@pytest.mark.parametrize("name", ["010.exec", "011.attach", "012.portforward"])
async def test_websocket_requests_of_todays_clients_are_served(
    server: StreamingServer, console: Console, name: str
) -> None:
    url = {
        "010.exec": server.exec_url("c", ["true"], tty=False, stdin=False, stdout=True, stderr=True),
        "011.attach": server.attach_url("c", stdin=False, tty=False, stdout=True, stderr=True),
        "012.portforward": server.port_forward_url("pod", []),
    }[name]
    player = Player(name, url)
    reader, writer = await asyncio.open_connection(*player.address)
    writer.write(player.head)
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), SOON)
    writer.close()
    assert head.startswith(b"HTTP/1.1 101 ")
    offered = re.search(rb"Sec-WebSocket-Protocol: (\S+)", player.head)
    assert offered is not None
    assert b"sec-websocket-protocol: " + offered[1].lower() in head.lower()
    assert b"sec-websocket-accept: " in head.lower()


class Console:
    """Replaces conmon: a socket that sends each client packets of output, then ends."""

    def __init__(self, folder: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(folder / "attach"))
        self._listener.listen(10)
        self._listener.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._serve())

    async def _serve(self) -> None:
        connection, _ = await self._loop.sock_accept(self._listener)
        with connection:
            for number in range(50):
                await self._loop.sock_sendall(connection, b"\x02tick %d\n" % number)
                await asyncio.sleep(0.01)
            await self._loop.sock_sendall(connection, b"\x03tock\n")

    def close(self) -> None:
        self._task.cancel()
        self._listener.close()


@pytest.fixture
async def console(tmp_path: Path, backend: LocalBackend) -> AsyncIterator[Console]:
    backend.attach_folder = tmp_path
    console = Console(tmp_path)
    yield console
    console.close()


def test_every_recording_is_played() -> None:
    played = set(re.findall(r"\"(\d\d\d\.\w+)\"", Path(__file__).read_text()))
    assert {path.name.removesuffix(".jsonl") for path in recorded_files()} <= played


def recorded_files() -> Iterator[Path]:
    return RECORDINGS.glob("*.jsonl")
