from __future__ import annotations

import socket

import pytest

from host.errors import AlreadyExistsError, InvalidArgumentError, UnsupportedError
from network.attachment import PortMapping
from network.ports import HostPort, PortRegistry, check_free_on_node, host_ports, normalise


def test_port_zero_is_left_out_and_addresses_are_written_one_way() -> None:
    mappings = [PortMapping("tcp", 80, 0), PortMapping("udp", 53, 53, "FD00:0::1")]
    assert normalise(mappings, (4, 6)) == (PortMapping("udp", 53, 53, "fd00::1"),)


@pytest.mark.parametrize(
    "mapping",
    [
        PortMapping("icmp", 80, 80),
        PortMapping("tcp", 0, 80),
        PortMapping("tcp", 65536, 80),
        PortMapping("tcp", 80, 65536),
        PortMapping("tcp", 80, -1),
        PortMapping("tcp", 80, 80, "localhost"),
        PortMapping("tcp", 80, 80, "fd00::1"),
    ],
)
def test_what_cannot_be_is_refused(mapping: PortMapping) -> None:
    with pytest.raises(InvalidArgumentError):
        normalise([mapping], (4,))


def test_the_ipv6_loopback_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="::1"):
        normalise([PortMapping("tcp", 80, 80, "::1")], (4, 6))


def test_no_address_means_every_family_of_the_pod() -> None:
    mapping = PortMapping("tcp", 80, 8080)
    assert host_ports(mapping, (4, 6)) == [HostPort("tcp", "0.0.0.0", 8080), HostPort("tcp", "::", 8080)]
    assert host_ports(PortMapping("tcp", 80, 8080, "10.0.0.1"), (4, 6)) == [HostPort("tcp", "10.0.0.1", 8080)]


@pytest.mark.parametrize(
    ("held", "wanted", "conflict"),
    [
        (HostPort("tcp", "0.0.0.0", 80), HostPort("tcp", "0.0.0.0", 80), True),
        (HostPort("tcp", "0.0.0.0", 80), HostPort("tcp", "10.0.0.1", 80), True),
        (HostPort("tcp", "10.0.0.1", 80), HostPort("tcp", "0.0.0.0", 80), True),
        (HostPort("tcp", "10.0.0.1", 80), HostPort("tcp", "10.0.0.2", 80), False),
        (HostPort("tcp", "0.0.0.0", 80), HostPort("tcp", "::", 80), False),
        (HostPort("tcp", "0.0.0.0", 80), HostPort("udp", "0.0.0.0", 80), False),
        (HostPort("tcp", "0.0.0.0", 80), HostPort("tcp", "0.0.0.0", 81), False),
    ],
)
def test_conflicts(held: HostPort, wanted: HostPort, conflict: bool) -> None:
    registry = PortRegistry()
    registry.take("holder", [held])
    if conflict:
        with pytest.raises(AlreadyExistsError, match="holder"):
            registry.take("late", [wanted])
        registry.release([held])
    registry.take("late", [wanted])


def test_a_refused_group_takes_nothing() -> None:
    registry = PortRegistry()
    registry.take("holder", [HostPort("tcp", "0.0.0.0", 81)])
    with pytest.raises(AlreadyExistsError):
        registry.take("late", [HostPort("tcp", "0.0.0.0", 80), HostPort("tcp", "0.0.0.0", 81)])
    registry.take("third", [HostPort("tcp", "0.0.0.0", 80)])


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_port_served_by_the_node_is_refused(kind: socket.SocketKind) -> None:
    protocol = "tcp" if kind == socket.SOCK_STREAM else "udp"
    with socket.socket(socket.AF_INET, kind) as server:
        server.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            server.listen()
        port = server.getsockname()[1]
        for host_ip in ("127.0.0.1", "0.0.0.0"):
            with pytest.raises(AlreadyExistsError, match=f"{port}/{protocol}"):
                check_free_on_node([HostPort(protocol, host_ip, port)])
        check_free_on_node([HostPort(protocol, "127.0.0.2", port)])
    check_free_on_node([HostPort(protocol, "127.0.0.1", port), HostPort(protocol, "192.0.2.200", port)])


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_port_the_node_only_calls_from_is_free(kind: socket.SocketKind) -> None:
    protocol = "tcp" if kind == socket.SOCK_STREAM else "udp"
    with socket.socket(socket.AF_INET, kind) as server, socket.socket(socket.AF_INET, kind) as client:
        server.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            server.listen()
        client.connect(server.getsockname())
        check_free_on_node([HostPort(protocol, "127.0.0.1", client.getsockname()[1])])
