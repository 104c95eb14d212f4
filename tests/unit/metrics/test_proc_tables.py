"""Tables of /proc/net, and what /proc says of processes."""

from __future__ import annotations

import os
import resource
import socket
import threading
from pathlib import Path

import pytest

from metrics.network import count_tcp, count_udp, parse_interfaces, read_current_network
from metrics.processes import read_processes
from metrics.stats import InterfaceReading

_DEV_HEAD = (
    b"Inter-|   Receive                                                |  Transmit\n"
    b" face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier\n"
)
DEV = _DEV_HEAD + (
    b"    lo:    3193      29    0    0    0     0          0         0     3193      29    0    0    0    0    0 0\n"
    b"  eth0: 130277100    4484    1    2    0     0          0         0   280457    3509    3    4    0    0    0 0\n"
    b"veth.1:9999999999 1 0 0 0 0 0 0 5 6 7 8 0 0 0 0\n"
)
_ENDING = b"00:00000000 00000000     0        0 1 1 0000000000000000 100 0 0 10 0\n"
TCP = (
    b"  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
    b"   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 "
    + _ENDING
    + b"   1: 0100007F:1F90 0100007F:9C4E 01 00000000:00000000 "
    + _ENDING
    + b"   2: 0100007F:1F90 0100007F:9C50 01 00000000:00000000 "
    + _ENDING
)
UDP = (
    b"   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref ptr drops\n"
    b"  102: 0100007F:0035 00000000:0000 07 00000010:00000100 00:00000000 00000000     0     0 4 2 0000000000000000 3\n"
    b"  103: 0100007F:0036 00000000:0000 07 00000000:00000001 00:00000000 00000000     0     0 5 2 0000000000000000 4\n"
)


def test_interfaces_but_the_loopback() -> None:
    assert parse_interfaces(DEV) == (
        InterfaceReading("eth0", 130277100, 4484, 1, 2, 280457, 3509, 3, 4),
        InterfaceReading("veth.1", 9999999999, 1, 0, 0, 5, 6, 7, 8),
    )


def test_a_pod_does_not_decide_how_long_answers_are() -> None:
    many = _DEV_HEAD + b"".join(b"d%d: 1 1 0 0 0 0 0 0 5 6 7 8 0 0 0 0\n" % number for number in range(1000))
    assert [interface.name for interface in parse_interfaces(many)] == [f"d{number}" for number in range(256)]


def test_sockets_by_state() -> None:
    counted = count_tcp(TCP.splitlines())
    assert (counted["listen"], counted["established"], counted["timewait"]) == (1, 2, 0)
    assert len(counted) == 11
    assert sum(count_tcp([]).values()) == 0
    assert count_udp(UDP.splitlines()) == {"listen": 2, "dropped": 7, "rxqueued": 0x101, "txqueued": 0x10}


def test_own_network_shows_a_listening_socket() -> None:
    before = read_current_network(connections=True).connections
    with socket.create_server(("127.0.0.1", 0)):
        after = read_current_network(connections=True).connections
    assert before is not None
    assert after is not None
    assert after.tcp["listen"] == before.tcp["listen"] + 1


def test_a_million_open_files_are_not_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metrics.processes.DESCRIPTORS_SEEN", 20)
    pid = os.getpid()
    pairs = [socket.socketpair() for _ in range(20)]
    try:
        found = read_processes([pid, pid], None)
        known_to_linux = Path("/proc/self/fd").stat().st_size
    finally:
        for end in (end for pair in pairs for end in pair):
            end.close()
    assert 0 < found.sockets <= 20
    assert found.descriptors >= 20
    assert abs(found.descriptors - 2 * known_to_linux) <= 2 or known_to_linux == 0


def test_own_process() -> None:
    release = threading.Event()
    threads = [threading.Thread(target=release.wait) for _ in range(3)]
    pid = os.getpid()
    before = read_processes([pid], pid)
    with socket.socket():
        for thread in threads:
            thread.start()
        after = read_processes([pid, 2**22 + 1], pid)
        release.set()
    for thread in threads:
        thread.join()
    assert before.processes == after.processes == 1
    assert after.descriptors == before.descriptors + 1
    assert after.sockets == before.sockets + 1
    assert sum(after.states.values()) == sum(before.states.values()) + 3
    assert after.states["running"] >= 1
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert after.open_files_soft_limit == (-1 if soft == resource.RLIM_INFINITY else soft)
    assert read_processes([], None).open_files_soft_limit is None
