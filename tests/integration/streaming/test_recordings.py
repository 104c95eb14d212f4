"""The recorded bytes of real clients, played against the server: each must end as its client needs."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cri.streaming import StreamingServer
from cri.streaming import spdy_frames as frames
from tests.integration.streaming.local_backend import LocalBackend

RECORDINGS = Path(__file__).parents[2] / "data" / "streams"


@dataclass
class Answer:
    """What the server sent: the head, data by stream, resets, and whether it said goodbye."""

    head: bytes = b""
    data: dict[int, bytes] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)
    resets: dict[int, int] = field(default_factory=dict)
    replies: set[int] = field(default_factory=set)
    pings: list[int] = field(default_factory=list)
    last_good: int | None = None

    def status(self, stream_id: int = 1) -> dict[str, Any]:
        return dict(json.loads(self.data[stream_id]))


class Player:
    """Sends a recorded client's bytes in the recorded order and pieces, and understands the answer."""

    def __init__(self, name: str, url: str, *, changed: bytes | None = None) -> None:
        recorded = (RECORDINGS / f"{name}.c2s.bin").read_bytes() if changed is None else changed
        path = re.sub(rb"http://[^/]+", b"", url.encode())
        head, rest = recorded.split(b"\r\n\r\n", 1)
        self.head = re.sub(rb" /\S+ ", b" " + path + b" ", head, count=1) + b"\r\n\r\n"
        self.body, self.farewell = split_farewell(rest)
        lines = (RECORDINGS / f"{name}.jsonl").read_text().splitlines()
        self.pieces = [step["bytes"] for step in map(json.loads, lines) if step["side"] == "c2s"][1:]
        host, port = re.sub(r"^http://|/.*", "", url).split(":")
        self.address = (host, int(port))
        self.answer = Answer()
        self._parser = frames.FrameParser(1 << 20)

    async def play(self, *, until_stream: int | None = 1) -> Answer:
        """To the end of ``until_stream`` (None: until nothing comes for a moment), then say goodbye as recorded."""
        self.reader, self.writer = await asyncio.open_connection(*self.address)
        self.writer.write(self.head)
        self.answer.head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 5)
        position = 0
        for size in [*self.pieces, len(self.body)]:
            self.writer.write(self.body[position : position + size])
            position += size
            await self._take(0.005)
        async with asyncio.timeout(20):
            while until_stream is not None and not self._over(until_stream):
                await self._take(5)
        if until_stream is None:
            while await self._take(0.5):
                pass
        self.writer.write(self.farewell)
        while await self._take(5):
            pass
        self.writer.close()
        return self.answer

    def _over(self, stream_id: int) -> bool:
        return stream_id in self.answer.finished or stream_id in self.answer.resets

    async def _take(self, seconds: float) -> bool:
        try:
            data = await asyncio.wait_for(self.reader.read(1 << 20), seconds)
        except (TimeoutError, ConnectionError):
            return False
        for frame in self._parser.feed(data):
            self._understand(frame)
        return bool(data)

    def _understand(self, frame: frames.ControlFrame | frames.DataChunk) -> None:
        answer = self.answer
        if isinstance(frame, frames.DataChunk):
            assert frame.stream_id in answer.replies, "data before the reply is dropped by clients"
            answer.data[frame.stream_id] = answer.data.get(frame.stream_id, b"") + frame.data
            if frame.fin:
                answer.finished.add(frame.stream_id)
        elif frame.kind == frames.SYN_REPLY:
            answer.replies.add(struct.unpack_from(">I", frame.payload)[0])
        elif frame.kind == frames.RST_STREAM:
            stream_id, status = struct.unpack(">II", frame.payload)
            answer.resets[stream_id] = status
        elif frame.kind == frames.PING:
            answer.pings.append(struct.unpack(">I", frame.payload)[0])
        elif frame.kind == frames.GOAWAY:
            answer.last_good = struct.unpack(">II", frame.payload)[0]


def split_farewell(data: bytes) -> tuple[bytes, bytes]:
    """Everything up to the RST_STREAM and GOAWAY frames at the end, and these: clients send them once they are done."""
    position = farewell = 0
    while position + 8 <= len(data):
        first, second = struct.unpack_from(">II", data, position)
        position += 8 + (second & 0xFFFFFF)
        if not (first >> 31 and first & 0xFFFF in (frames.RST_STREAM, frames.GOAWAY)):
            farewell = min(position, len(data))
    return data[:farewell], data[farewell:]


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
    recorded = (RECORDINGS / "006.exec.c2s.bin").read_bytes()
    sent, missing = count_input(recorded, 3)
    rest = bytes(missing)
    for start in range(sent + missing, 3_000_000, 32768):
        size = min(32768, 3_000_000 - start)
        rest += frames.data_header(3, size, fin=False) + bytes(size)
    rest += frames.data_header(3, 0, fin=True)
    url = server.exec_url("c", ["wc", "-c"], tty=False, stdin=True, stdout=True, stderr=True)
    answer = await Player("006.exec", url, changed=recorded + rest).play()
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
    with socket.create_server(("127.0.0.1", 0)) as unused:
        closed_port = unused.getsockname()[1]
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
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    writer.close()
    assert head.startswith(b"HTTP/1.1 101 ")
    offered = re.search(rb"Sec-WebSocket-Protocol: (\S+)", player.head)
    assert offered is not None
    assert b"sec-websocket-protocol: " + offered[1].lower() in head.lower()
    assert b"sec-websocket-accept: " in head.lower()


def count_input(recorded: bytes, stream_id: int) -> tuple[int, int]:
    """Bytes of the stream in a cut recording, and how many its last frame still misses."""
    position = recorded.index(b"\r\n\r\n") + 4
    sent = missing = 0
    while position + 8 <= len(recorded):
        first, second = struct.unpack_from(">II", recorded, position)
        length = second & 0xFFFFFF
        there = min(length, len(recorded) - position - 8)
        if first == stream_id:
            sent += there
            missing = length - there
        position += 8 + length
    return sent, missing


class Console:
    """Stands where conmon does: a socket that sends each client packets of output, then ends."""

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
