"""Traffic read inside network namespaces, as the pod sees it."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from host import libc
from host.concurrency.threads import in_fresh_thread
from host.files import mounts
from metrics.network import read_networks

DATAGRAMS = 20
SIZE = 1000


def in_namespace(path: str | None, work: Callable[[], None]) -> None:
    """Run ``work`` in a thread inside the namespace pinned at ``path``, or in a new one."""

    def body() -> None:
        if path is None:
            libc.unshare(libc.CLONE_NEWNET)
        else:
            with open(path, "rb") as pin:
                libc.setns(pin.fileno(), libc.CLONE_NEWNET)
        work()

    with ThreadPoolExecutor(1) as thread:
        thread.submit(body).result()


@pytest.fixture
def pods(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Two namespaces with a veth pair between them: 10.200.77.1 and .2."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    pins = [tmp_path / "a", tmp_path / "b"]
    try:
        for pin in pins:
            pin.touch()
            in_namespace(None, partial(mounts.bind, "/proc/thread-self/ns/net", pin))
        in_namespace(str(pins[0]), lambda: ip("link", "add", "pktm0", "type", "veth", "peer", "name", "pktm1"))
        in_namespace(str(pins[0]), lambda: move_link("pktm1", pins[1]))
        for number, pin in enumerate(pins):
            in_namespace(str(pin), partial(configure, number))
        yield str(pins[0]), str(pins[1])
    finally:
        for pin in pins:
            mounts.unmount(pin)


def ip(*words: str) -> None:
    subprocess.run(("ip", *words), check=True)


def move_link(name: str, pin: Path) -> None:
    with open(pin, "rb") as other:
        command = ("ip", "link", "set", name, "netns", f"/proc/self/fd/{other.fileno()}")
        subprocess.run(command, check=True, pass_fds=(other.fileno(),))


def configure(number: int) -> None:
    ip("address", "add", f"10.200.77.{number + 1}/24", "dev", f"pktm{number}")
    ip("link", "set", f"pktm{number}", "up")


async def test_traffic_of_other_pods_is_not_counted(pods: tuple[str, str]) -> None:
    before = [reading.interfaces[0] for reading in await in_fresh_thread(read_networks, pods) if reading is not None]

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for _ in range(DATAGRAMS):
                sender.sendto(b"x" * SIZE, ("10.200.77.2", 9))

    in_namespace(pods[0], send)
    after = [reading.interfaces[0] for reading in await in_fresh_thread(read_networks, pods) if reading is not None]
    assert [interface.name for interface in after] == ["pktm0", "pktm1"]
    sent = after[0].tx_bytes - before[0].tx_bytes
    assert sent >= DATAGRAMS * (SIZE + 28 + 14)
    assert after[1].rx_bytes - before[1].rx_bytes >= DATAGRAMS * (SIZE + 28 + 14)
    assert after[0].tx_packets - before[0].tx_packets >= DATAGRAMS
    assert after[0].rx_bytes - before[0].rx_bytes < DATAGRAMS * SIZE
    assert after[1].tx_bytes - before[1].tx_bytes < DATAGRAMS * SIZE


async def test_a_missing_namespace_has_no_statistics_and_others_are_read(pods: tuple[str, str], tmp_path: Path) -> None:
    not_a_namespace = tmp_path / "empty"
    not_a_namespace.touch()
    readings = await in_fresh_thread(read_networks, [pods[0], str(tmp_path / "none"), str(not_a_namespace), pods[1]])
    assert [reading is not None for reading in readings] == [True, False, False, True]
    assert await in_fresh_thread(read_networks, []) == []


async def test_reading_leaves_the_agent_in_its_own_namespace(pods: tuple[str, str]) -> None:
    own = Path("/proc/thread-self/ns/net").readlink()
    await in_fresh_thread(read_networks, pods)
    assert Path("/proc/thread-self/ns/net").readlink() == own


async def test_threads_started_while_reading_are_in_the_agent_s_namespace(pods: tuple[str, str]) -> None:
    """A thread is in the namespace of the one that starts it, and would keep a pod's namespace for ever."""
    found: list[Path] = []

    def visit() -> None:
        read_networks([*pods, "/no/such/namespace"])
        started = threading.Thread(target=lambda: found.append(Path("/proc/thread-self/ns/net").readlink()))
        started.start()
        started.join()

    await in_fresh_thread(visit)
    assert found == [Path("/proc/self/ns/net").readlink()]


async def test_sockets_of_the_pod_and_not_of_the_host(pods: tuple[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)):
        (reading,) = await in_fresh_thread(read_networks, pods[:1], connections=True)
    assert reading is not None
    assert reading.connections is not None
    assert reading.connections.tcp["listen"] == 0
