"""Network namespaces for tests: sockets made inside them can be used from anywhere."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from host import libc
from host.files import mounts
from network.attachment import AttachRequest, Bandwidth, PortMapping
from tests.support.agent import PATIENCE, SOON

T = TypeVar("T")

_SIOCGIFHWADDR = 0x8927


class Namespace:
    """A network namespace pinned at ``path``; without ``close`` nothing would end it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()
        _in_thread(self._make)

    def _make(self) -> None:
        libc.unshare(libc.CLONE_NEWNET)
        mounts.bind("/proc/thread-self/ns/net", self.path)

    def run(self, work: Callable[[], T]) -> T:
        """Run ``work`` in a thread inside the namespace."""

        def body() -> T:
            with open(self.path, "rb") as pin:
                libc.setns(pin.fileno(), libc.CLONE_NEWNET)
            return work()

        return _in_thread(body)

    def open_socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A socket inside, with a time limit of a second, or more where the machine is slow."""
        made = self.run(lambda: socket.socket(family, kind))
        made.settimeout(PATIENCE)
        return made

    def packet_socket(self, interface: str = "eth0") -> socket.socket:
        """A socket that sends raw frames."""
        made = self.run(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
        self.run(lambda: made.bind((interface, 0)))
        return made

    def command(self, *command: str) -> str:
        """The output of a command run inside."""
        return self.run(lambda: subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    def close(self) -> None:
        """Release the namespace; repeatable."""
        mounts.unmount(self.path)


def _in_thread(work: Callable[[], T]) -> T:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


def listen(where: Namespace | None, port: int, family: int = socket.AF_INET, host: str = "") -> socket.socket:
    """A TCP server in a namespace, or on the node."""
    server = where.open_socket(family) if where else _node_socket(family, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((host, port))
    server.listen()
    return server


def receive_on(where: Namespace | None, port: int, family: int = socket.AF_INET, host: str = "") -> socket.socket:
    """A UDP server in a namespace, or on the node."""
    server = where.open_socket(family, socket.SOCK_DGRAM) if where else _node_socket(family, socket.SOCK_DGRAM)
    server.bind((host, port))
    return server


def talk(where: Namespace | None, server: socket.socket, address: tuple[str, int]) -> str:
    """Connect to ``address``, send a word there and back over TCP, and return the client's address the server saw."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with where.open_socket(family) if where else _node_socket(family, socket.SOCK_STREAM) as client:
        client.connect(address)
        connection, peer = server.accept()
        with connection:
            connection.settimeout(PATIENCE)
            client.sendall(b"ping")
            assert connection.recv(16) == b"ping"
            connection.sendall(b"pong")
            assert client.recv(16) == b"pong"
    return str(peer[0])


def exchange(where: Namespace | None, server: socket.socket, address: tuple[str, int]) -> str:
    """The same over UDP."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with where.open_socket(family, socket.SOCK_DGRAM) if where else _node_socket(family, socket.SOCK_DGRAM) as client:
        client.connect(address)
        client.send(b"ping")
        data, peer = server.recvfrom(16)
        assert data == b"ping"
        server.sendto(b"pong", peer)
        assert client.recv(16) == b"pong"
    return str(peer[0])


def _node_socket(family: int, kind: int) -> socket.socket:
    made = socket.socket(family, kind)
    made.settimeout(PATIENCE)
    return made


def mac_of(interface: str) -> str:
    """The MAC of an interface of the node."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe, _SIOCGIFHWADDR, struct.pack("256s", interface.encode()))
    return answer[18:24].hex(":")


def nft_tables() -> set[str]:
    """The names of all nftables tables of the node."""
    listing = subprocess.run(["nft", "list", "tables"], check=True, capture_output=True, text=True).stdout
    return {line.split()[2] for line in listing.splitlines()}


def links_with(prefix: str) -> list[str]:
    """The node's links whose names begin with ``prefix``."""
    return sorted(name for _, name in socket.if_nameindex() if name.startswith(prefix))


def descriptors() -> int:
    """How many descriptors this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def command(*words: str) -> str:
    """The output of a command run on the node."""
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def start(*words: str, folder: Path) -> subprocess.Popen[bytes]:
    """A child whose output can be read; Python finds the modules in ``folder``."""
    return subprocess.Popen(words, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(folder)})


def wait_until(condition: Callable[[], bool], seconds: float = SOON) -> None:
    """Wait for what the kernel does in the background; raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.01)


def request(
    sandbox_id: str, path: Path | str, mappings: Sequence[PortMapping] = (), bandwidth: Bandwidth | None = None
) -> AttachRequest:
    """What a pod called ``sandbox_id`` asks of the network."""
    return AttachRequest(
        sandbox_id=sandbox_id,
        netns_path=str(path),
        port_mappings=tuple(mappings),
        bandwidth=bandwidth or Bandwidth(),
        name=sandbox_id,
        namespace="default",
        uid=f"uid-{sandbox_id}",
    )
