from __future__ import annotations

import socket
from collections.abc import Sequence

import pytest

from host.errors import AlreadyExistsError, InvalidArgumentError
from network import conntrack
from network.attachment import PortMapping
from network.netlink import NETLINK_NETFILTER, Message
from network.netlink_socket import NetlinkSocket, Refusal
from tests.integration.network import frames
from tests.integration.network.conftest import Node, Outside
from tests.integration.network.namespaces import command, exchange, listen, mac_of, receive_on, request, talk
from tests.support.ports import free_port


async def test_tcp_and_udp_from_the_node_another_pod_itself_and_outside(node: Node, outside: Outside) -> None:
    tcp, udp = free_port(), free_port()
    pod = await node.pod("server", PortMapping("tcp", 80, tcp), PortMapping("udp", 53, udp))
    other = await node.pod("client")
    gateway = pod.attachment.gateways[0]
    with listen(pod.namespace, 80) as server, receive_on(pod.namespace, 53) as receiver:
        for passing, end, port in ((talk, server, tcp), (exchange, receiver, udp)):
            assert passing(None, end, ("127.0.0.1", port)) == gateway
            assert passing(None, end, (outside.node_ip, port)) == outside.node_ip
            assert passing(other.namespace, end, (outside.node_ip, port)) == other.ip
            assert passing(other.namespace, end, (gateway, port)) == other.ip
            assert passing(pod.namespace, end, (outside.node_ip, port)) == gateway
            assert passing(outside.namespace, end, (outside.node_ip, port)) == outside.ip


async def test_a_port_on_one_address_is_not_open_on_another(node: Node, outside: Outside) -> None:
    port = free_port()
    pod = await node.pod("server", PortMapping("tcp", 80, port, "127.0.0.1"))
    with listen(pod.namespace, 80) as server:
        assert talk(None, server, ("127.0.0.1", port)) == pod.attachment.gateways[0]
        for client in (None, outside.namespace):
            with pytest.raises(ConnectionRefusedError):
                talk(client, server, (outside.node_ip, port))


async def test_the_same_port_on_two_addresses_leads_to_two_pods(node: Node, outside: Outside) -> None:
    port = free_port()
    one = await node.pod("one", PortMapping("tcp", 80, port, "127.0.0.1"))
    two = await node.pod("two", PortMapping("tcp", 80, port, outside.node_ip))
    with listen(one.namespace, 80) as first, listen(two.namespace, 80) as second:
        talk(None, first, ("127.0.0.1", port))
        talk(outside.namespace, second, (outside.node_ip, port))


async def test_ipv6_from_the_node_and_another_pod(dual: Node) -> None:
    port = free_port()
    pod, other = await dual.pod("server", PortMapping("tcp", 80, port)), await dual.pod("client")
    gateway = pod.attachment.gateways[1]
    with listen(pod.namespace, 80, socket.AF_INET6) as server:
        assert talk(other.namespace, server, (gateway, port)) == other.address(6)
        assert talk(pod.namespace, server, (gateway, port)) == gateway
        assert talk(None, server, (gateway, port)) == gateway
        with pytest.raises(ConnectionRefusedError):
            talk(None, server, ("::1", port))
    with listen(pod.namespace, 80) as server:
        assert talk(None, server, ("127.0.0.1", port)) == pod.attachment.gateways[0]


async def test_outside_cannot_reach_the_nodes_loopback(node: Node, outside: Outside) -> None:
    port = free_port()
    pod = await node.pod("server", PortMapping("udp", 53, port))
    intruder = await node.pod("intruder")
    with receive_on(pod.namespace, 53) as receiver:
        with outside.namespace.packet_socket() as wire:
            macs = (outside.namespace.run(lambda: mac_of("eth0")), mac_of(outside.link))
            wire.send(frames.udp(macs, (outside.ip, "127.0.0.1"), port, b"attack"))
            wire.send(frames.udp(macs, (outside.ip, outside.node_ip), port, b"allowed"))
        with intruder.namespace.packet_socket() as wire:
            macs = (intruder.attachment.mac, mac_of(node.bridge))
            wire.send(frames.udp(macs, (intruder.ip, "127.0.0.1"), port, b"attack"))
        assert receiver.recv(64) == b"allowed"
        assert exchange(None, receiver, ("127.0.0.1", port)) == pod.attachment.gateways[0]


async def test_the_nodes_own_loopback_servers_are_closed_to_pods(node: Node) -> None:
    pod = await node.pod("intruder")
    with receive_on(None, 0, host="127.0.0.1") as server, pod.namespace.packet_socket() as wire:
        macs = (pod.attachment.mac, mac_of(node.bridge))
        wire.send(frames.udp(macs, (pod.ip, "127.0.0.1"), server.getsockname()[1], b"attack"))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
            own.sendto(b"own", server.getsockname())
        assert server.recv(64) == b"own"


async def test_ports_end_with_the_pod_and_can_be_taken_again(node: Node) -> None:
    port = free_port()
    mapping = PortMapping("tcp", 80, port)
    first = await node.pod("first", mapping)
    with pytest.raises(AlreadyExistsError, match="first"):
        await node.pod("second", mapping)
    await node.network.detach("first")
    first.namespace.close()
    third = await node.pod("third", mapping)
    with listen(third.namespace, 80) as server:
        talk(None, server, ("127.0.0.1", port))


@pytest.mark.parametrize("others", [0, 20])
async def test_a_running_udp_flow_moves_to_the_pod_that_takes_the_port(node: Node, others: int) -> None:
    port = free_port()
    more = [PortMapping("udp", 54, 21000 + number) for number in range(others)]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect(("127.0.0.1", port))
        client.settimeout(1)
        for name in ("first", "second"):
            pod = await node.pod(name, PortMapping("udp", 53, port), *more)
            with receive_on(pod.namespace, 53) as receiver:
                client.send(name.encode())
                assert receiver.recv(16) == name.encode()
            await node.network.detach(name)


async def test_conflicts_are_refused_before_anything_is_made(node: Node) -> None:
    port, other = free_port(), free_port()
    await node.pod("holder", PortMapping("tcp", 80, port, "127.0.0.1"))
    before, links = node.rows(), node.links()
    conflicts = {
        "holder": [PortMapping("tcp", 80, port)],
        "the same pod": [PortMapping("tcp", 80, other), PortMapping("tcp", 81, other)],
    }
    for holder, mappings in conflicts.items():
        with pytest.raises(AlreadyExistsError, match=holder):
            await node.network.attach(request("late", str(node.namespace().path), mappings))
    with listen(None, 0, host="127.0.0.1") as served:
        with pytest.raises(AlreadyExistsError, match="process of the node"):
            await node.pod("late", PortMapping("tcp", 80, served.getsockname()[1]))
    for wrong in (PortMapping("icmp", 1, 1), PortMapping("tcp", 0, 1), PortMapping("tcp", 1, 1, "fd00::1")):
        with pytest.raises(InvalidArgumentError):
            await node.pod("late", wrong)
    assert (node.rows(), node.links()) == (before, links)
    assert await node.network.audit(["holder"]) == []


async def test_the_same_number_is_free_for_another_protocol_and_zero_means_none(node: Node) -> None:
    port = free_port()
    await node.pod("one", PortMapping("tcp", 80, port), PortMapping("tcp", 81, 0))
    await node.pod("two", PortMapping("udp", 80, port), PortMapping("sctp", 80, port), PortMapping("tcp", 81, 0))
    assert node.rows()["host_ports"] == 3
    assert await node.network.audit(["one", "two"]) == []


@pytest.mark.parametrize("version", [4, 6])
async def test_sctp_reaches_the_pod_at_its_own_port(dual: Node, version: int) -> None:
    """By hand, since this kernel need not support SCTP to forward it."""
    port, family = 20090, socket.AF_INET if version == 4 else socket.AF_INET6
    pod = await dual.pod("server", PortMapping("sctp", 9, port))
    other = await dual.pod("client")
    gateway = pod.attachment.gateways[0 if version == 4 else 1]

    def open_raw() -> socket.socket:
        return socket.socket(family, socket.SOCK_RAW, 132)

    for sender in (other.namespace.run(open_raw), open_raw()):
        with sender, pod.namespace.run(open_raw) as receiver:
            receiver.settimeout(2)
            sender.sendto(frames.sctp_init(40000, port), (gateway, 0))
            packet = receiver.recv(256)
            head = 20 if version == 4 else 0
            assert int.from_bytes(packet[head + 2 : head + 4], "big") == 9


async def test_ipv6_from_outside_and_on_one_address(dual: Node, outside: Outside) -> None:
    node_ip, ip = "fd00:beef::1", "fd00:beef::2"
    command("ip", "address", "add", f"{node_ip}/64", "dev", outside.link, "nodad")
    outside.namespace.command("ip", "address", "add", f"{ip}/64", "dev", "eth0", "nodad")
    port, udp = free_port(), free_port()
    pod = await dual.pod("server", PortMapping("tcp", 80, port, node_ip), PortMapping("udp", 53, udp))
    with listen(pod.namespace, 80, socket.AF_INET6) as server:
        assert talk(outside.namespace, server, (node_ip, port)) == ip
        with pytest.raises(ConnectionRefusedError):
            talk(None, server, (pod.attachment.gateways[1], port))
    with receive_on(pod.namespace, 53, socket.AF_INET6) as receiver:
        assert exchange(outside.namespace, receiver, (node_ip, udp)) == ip
        assert exchange(None, receiver, (node_ip, udp)) == node_ip


async def test_host_ports_survive_a_restart_and_a_flushed_ruleset(node: Node) -> None:
    port = free_port()
    pod = await node.pod("server", PortMapping("tcp", 80, port))
    await node.restart()
    with listen(pod.namespace, 80) as server:
        talk(None, server, ("127.0.0.1", port))
        with pytest.raises(AlreadyExistsError):
            await node.pod("late", PortMapping("tcp", 80, port))


@pytest.mark.parametrize("protocol", ["tcp", "udp", "sctp"])
async def test_a_pod_with_a_thousand_ports(node: Node, protocol: str) -> None:
    """``make bench ARGS=--network`` measures how long one takes."""
    mappings = [PortMapping(protocol, 80, port) for port in range(20000, 21000)]
    await node.pod("many", *mappings)
    assert node.rows()["host_ports"] == 1000
    assert await node.network.audit(["many"]) == []
    await node.network.detach("many")
    assert node.rows()["host_ports"] == 0
    node.namespaces[-1].close()


async def test_flows_that_a_flood_left_are_forgotten_many_at_a_time(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody outside makes as many as the kernel keeps: one by one they kept a pod's stop beyond its deadline."""
    port, flows = 20091, 1000  # below those that the kernel gives to clients
    await node.pod("server", PortMapping("udp", 53, port))
    for _ in range(flows):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.sendto(b"x", ("127.0.0.1", port))
    calls = []
    exchange_all = NetlinkSocket.exchange

    def counted(self: NetlinkSocket, messages: Sequence[Message], last: int = -1) -> list[Refusal]:
        refused = exchange_all(self, messages, last)
        calls.append((len(messages), len(refused)))
        return refused

    monkeypatch.setattr(NetlinkSocket, "exchange", counted)
    with NetlinkSocket(NETLINK_NETFILTER) as netfilter:
        conntrack.forget_udp(netfilter, [PortMapping("udp", 53, port)])
        assert sum(sent - refused for sent, refused in calls) > flows // 2  # a port may serve twice
        assert len(calls) <= flows // 100
        calls.clear()
        conntrack.forget_udp(netfilter, [PortMapping("udp", 53, port)])
        assert calls == []
