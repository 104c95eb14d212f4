"""The cost of streams: the duration of a command, the throughput of one stream, and a hundred commands at once."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

from cri.streaming.httpstream import spdy_frames as frames
from cri.streaming.httpstream.spdy_session import SpdySession
from proto.runtime.v1 import cri_pb2
from tests.bench import processes
from tests.bench.bare import BareRuntime
from tests.bench.goals import StreamCost
from tests.bench.phases import Target
from tests.bench.samples import Samples
from tests.bench.workload import EXEC_COMMAND

_PORT = 7000
_MEGABYTES = 1024
_FILE = ("/bin/busybox", "dd", "if=/dev/zero", "bs=1M", f"count={_MEGABYTES}")
_SERVER = ("/bin/busybox", "nc", "-l", "-p", str(_PORT), "-e", *_FILE)
_WAITING = ("/bin/busybox", "sh", "-c", "echo; exec /bin/busybox sleep 1000")
_RUNS = 3


def measure(target: Target, bare: BareRuntime | None, bare_samples: Samples, rounds: int, sessions: int) -> StreamCost:
    """Measure ``rounds`` commands and bare ones, then the throughput, then ``sessions`` commands at the same time."""
    workload = target.workload
    running = bare.running() if bare is not None else contextlib.nullcontext(lambda samples: None)
    with running as execute, workload.pod(Samples()) as (pod, config):
        container = workload.create(pod, config, Samples())
        workload.start(container, Samples())
        for _ in range(rounds):
            # In turns, each in a running container.
            with target.samples.timed("exec stream"), _command(target, container, EXEC_COMMAND) as client:
                client.check_success()
            execute(bare_samples)
        out = max(_out_of_command(target, container) for _ in range(_RUNS))
        forwarded = max(_through_port(target, pod, container) for _ in range(_RUNS))
        resident = _resident_with(target, container, sessions)
        workload.remove(container, Samples())
    return StreamCost(out, forwarded, sessions, resident)


def _out_of_command(target: Target, container: str) -> float:
    """Bytes per second of a command's output."""
    with _command(target, container, _FILE) as client:
        begin = time.perf_counter()
        size = client.size_until_end(client.stdout)
        if size != _MEGABYTES << 20:
            raise RuntimeError(f"{size} bytes came out of {_FILE}")
        return size / (time.perf_counter() - begin)


def _through_port(target: Target, pod: str, container: str) -> float:
    """Bytes per second received from a server in the pod."""
    client = target.workload.client
    with _command(target, container, _SERVER):
        url = client.call("PortForward", cri_pb2.PortForwardRequest(pod_sandbox_id=pod, port=[_PORT])).url
        while True:
            with contextlib.closing(_Spdy(url, "portforward.k8s.io")) as stream:
                stream.open(streamtype="error", port=str(_PORT), requestid="0")
                data = stream.open(streamtype="data", port=str(_PORT), requestid="0")
                begin = time.perf_counter()
                size = stream.size_until_end(data)
                if size:
                    return size / (time.perf_counter() - begin)
            url = client.call("PortForward", cri_pb2.PortForwardRequest(pod_sandbox_id=pod, port=[_PORT])).url


def _resident_with(target: Target, container: str, sessions: int) -> int:
    """The resident bytes of the server while ``sessions`` commands run."""
    with contextlib.ExitStack() as stack:
        for client in [stack.enter_context(_command(target, container, _WAITING)) for _ in range(sessions)]:
            next(client.data())
        pid = target.workload.client.server_pid()
        return processes.resident_bytes(pid) if pid is not None else 0


@contextlib.contextmanager
def _command(target: Target, container: str, command: tuple[str, ...]) -> Iterator[_Spdy]:
    request = cri_pb2.ExecRequest(container_id=container, cmd=command, stdout=True)
    with contextlib.closing(_Spdy(target.workload.client.call("Exec", request).url, "v4.channel.k8s.io")) as client:
        client.error = client.open(streamtype="error")
        client.stdout = client.open(streamtype="stdout")
        yield client


class _Spdy:
    """A blocking client like present kubectl versions: it answers pings and sends no window updates."""

    error = stdout = 0

    def __init__(self, url: str, protocol: str) -> None:
        parts = urlsplit(url)
        self._socket = socket.create_connection((parts.hostname, parts.port or 80), 60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._session = SpdySession(client=True)
        lines = [f"POST {parts.path} HTTP/1.1", f"Host: {parts.netloc}", "Content-Length: 0", "Connection: Upgrade"]
        lines += ["Upgrade: SPDY/3.1", f"X-Stream-Protocol-Version: {protocol}", "", ""]
        self._socket.sendall("\r\n".join(lines).encode())
        self._buffer = bytearray()
        while b"\r\n\r\n" not in self._buffer:
            self._fill()
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 101 "):
            raise RuntimeError(head.decode(errors="replace"))

    def open(self, **headers: str) -> int:
        """Open a stream and return its id."""
        stream_id = self._session.open_stream(headers)
        self._socket.sendall(self._session.take_output())
        return stream_id

    def data(self) -> Iterator[tuple[int, bool, memoryview]]:
        """Stream, whether it ends, and the bytes of every data frame that has data or ends its stream."""
        while True:
            while len(self._buffer) < 8 or len(self._buffer) < 8 + self._length():
                self._fill()
            first, second = struct.unpack_from(">II", self._buffer)
            end = 8 + self._length()
            payload = bytes(memoryview(self._buffer)[8:end])
            del self._buffer[:end]
            if first >> 31:
                if first & 0xFFFF == frames.PING:
                    self._socket.sendall(frames.ping(struct.unpack(">I", payload)[0]))
                elif first & 0xFFFF == frames.RST_STREAM:
                    yield struct.unpack_from(">I", payload)[0], True, memoryview(b"")
            else:
                yield first, bool(second >> 24 & frames.FLAG_FIN), memoryview(payload)

    def size_until_end(self, stream_id: int) -> int:
        """The number of bytes received on a stream until its end."""
        size = 0
        for number, ends, data in self.data():
            if number == stream_id:
                size += len(data)
                if ends:
                    break
        return size

    def check_success(self) -> None:
        """Wait for the status of a command. RuntimeError if it is not success."""
        status = b""
        for number, ends, data in self.data():
            if number == self.error:
                status += data
                if ends:
                    break
        if json.loads(status)["status"] != "Success":
            raise RuntimeError(status.decode())

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _length(self) -> int:
        return int.from_bytes(self._buffer[5:8], "big")

    def _fill(self) -> None:
        data = self._socket.recv(1 << 20)
        if not data:
            raise RuntimeError("the server closed the stream")
        self._buffer += data
