from __future__ import annotations

import socket
from pathlib import Path

import pytest

from network.attachment import bridge_mac, link_local
from network.nftables.ruleset import load, remove_script
from tests.integration.network import frames
from tests.integration.network.conftest import Node, Outside, Pod, running_node
from tests.integration.network.namespaces import command, exchange, listen, receive_on, request, talk

# The address of LLDP: a bridge hands such frames to the node as they come.
PAST_THE_BRIDGE = "01:80:c2:00:00:0e"


@pytest.mark.parametrize("version", [4, 6])
async def test_pods_and_node_reach_each_other_with_their_own_addresses(dual: Node, version: int) -> None:
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    one, two = await dual.pod("one"), await dual.pod("two")
    gateway = one.attachment.gateways[0 if version == 4 else 1]
    with listen(two.namespace, 80, family) as server:
        assert talk(one.namespace, server, (two.address(version), 80)) == one.address(version)
        assert talk(None, server, (two.address(version), 80)) == gateway
    with listen(None, 0, family, gateway) as server:
        assert talk(one.namespace, server, server.getsockname()[:2]) == one.address(version)


async def test_ipv6_works_where_it_was_switched_off(tmp_path: Path) -> None:
    async with running_node(tmp_path, pod_cidrs=("fd00:206:6::/64",)) as node:
        Path(f"/proc/sys/net/ipv6/conf/{node.bridge}/disable_ipv6").write_text("1")
        await node.restart()
        namespace = node.namespace()
        namespace.run(lambda: Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1"))
        pod = Pod(namespace, await node.network.attach(request("one", namespace.path)))
        with listen(pod.namespace, 80, socket.AF_INET6) as server:
            talk(None, server, (pod.ip, 80))


async def test_a_pod_has_loopback_and_no_address_it_was_not_given(node: Node) -> None:
    pod = await node.pod("one")
    shown = pod.namespace.command("ip", "-o", "address")
    assert {line.split()[3] for line in shown.splitlines()} == {"127.0.0.1/8", "::1/128", f"{pod.ip}/32"}
    assert f"mtu {pod.attachment.mtu}" in pod.namespace.command("ip", "link", "show", "eth0")


async def test_what_leaves_the_pod_ranges_has_the_nodes_address(node: Node, outside: Outside) -> None:
    pod = await node.pod("one")
    with listen(outside.namespace, 80) as server:
        assert talk(pod.namespace, server, (outside.ip, 80)) == outside.node_ip


async def test_what_a_cloud_serves_at_a_link_local_address_is_in_reach(node: Node, outside: Outside) -> None:
    pod, service = await node.pod("one"), "169.254.169.254"
    outside.namespace.command("ip", "address", "add", f"{service}/32", "dev", "eth0")
    command("ip", "route", "add", service, "via", outside.ip)
    with listen(outside.namespace, 80) as server:
        assert talk(pod.namespace, server, (service, 80)) == outside.node_ip


async def test_what_goes_to_the_cluster_ranges_keeps_the_pods_address(tmp_path: Path, outside: Outside) -> None:
    async with running_node(tmp_path, cluster_cidrs=(_block(outside.ip),)) as node:
        pod = await node.pod("one")
        outside.namespace.command("ip", "route", "add", f"{node.subnet}.0/24", "via", outside.node_ip)
        with listen(outside.namespace, 80) as server:
            assert talk(pod.namespace, server, (outside.ip, 80)) == pod.ip
        with listen(pod.namespace, 80) as server:
            assert talk(outside.namespace, server, (pod.ip, 80)) == outside.ip


def _block(address: str) -> str:
    return address.rpartition(".")[0] + ".0/24"


async def test_a_pod_cannot_use_what_is_not_its_own(node: Node) -> None:
    liar, victim = await node.pod("liar"), await node.pod("victim")
    gateway, bridge = liar.attachment.gateways[0], bridge_mac(node.bridge).hex(":")
    own, other = liar.attachment.mac, victim.attachment.mac
    with receive_on(None, 0, host=gateway) as server, liar.namespace.packet_socket() as wire:
        port = server.getsockname()[1]
        lies = {
            b"victim's address": ((own, bridge), (victim.ip, gateway)),
            b"victim's mac": ((other, bridge), (liar.ip, gateway)),
            b"both of the victim": ((other, bridge), (victim.ip, gateway)),
            b"an address of nobody": ((own, bridge), (f"{node.subnet}.99", gateway)),
            b"past the bridge": ((own, PAST_THE_BRIDGE), (victim.ip, gateway)),
            b"past the bridge, as itself": ((own, PAST_THE_BRIDGE), (liar.ip, gateway)),
        }
        for payload, (macs, addresses) in lies.items():
            wire.send(frames.udp(macs, addresses, port, payload))
        wire.send(frames.udp((own, bridge), (liar.ip, gateway), port, b"truth"))
        assert server.recv(64) == b"truth"
        await load(remove_script(node.bridge))  # the control: without the rules the same forged packets arrive
        for payload in (b"victim's address", b"past the bridge"):
            wire.send(frames.udp(*lies[payload], port, payload))
            assert server.recv(64) == payload


async def test_a_pod_cannot_take_anothers_place_on_the_bridge(node: Node) -> None:
    liar, victim = await node.pod("liar"), await node.pod("victim")
    with listen(victim.namespace, 80) as server, liar.namespace.packet_socket() as wire:
        talk(None, server, (victim.ip, 80))
        wire.send(frames.lldp(victim.attachment.mac))
        talk(None, server, (victim.ip, 80))
        command("ip", "link", "set", node.bridge, "type", "bridge", "no_linklocal_learn", "0")
        wire.send(frames.lldp(victim.attachment.mac))  # the control: now the bridge believes it
        with pytest.raises(TimeoutError):
            talk(None, server, (victim.ip, 80))
        await node.restart()
        talk(victim.namespace, server, (victim.ip, 80))


async def test_a_pod_cannot_announce_anothers_address(dual: Node) -> None:
    liar, victim = await dual.pod("liar"), await dual.pod("victim")
    bridge = bridge_mac(dual.bridge).hex(":")
    own, gateways = liar.attachment.mac, liar.attachment.gateways
    for version, family in ((4, socket.AF_INET), (6, socket.AF_INET6)):
        with listen(victim.namespace, 80, family) as server:
            talk(None, server, (victim.address(version), 80))
            with listen(liar.namespace, 80, family) as own_server:
                talk(None, own_server, (liar.address(version), 80))
    target = victim.address(6)
    lies = [
        frames.arp_reply((own, bridge), (own, victim.ip), (bridge, gateways[0])),
        frames.arp_reply((own, bridge), (victim.attachment.mac, victim.ip), (bridge, gateways[0])),
        frames.arp_reply((own, bridge), (victim.attachment.mac, liar.ip), (bridge, gateways[0])),
        frames.neighbour_advertisement((own, bridge), (liar.address(6), gateways[1]), target),
        frames.neighbour_advertisement((own, bridge), (str(link_local(own)), gateways[1]), target),
        frames.neighbour_advertisement((own, bridge), (victim.address(6), gateways[1]), target),
    ]
    with liar.namespace.packet_socket() as wire:
        for lie in lies:
            wire.send(lie)
        assert _neighbours(dual.bridge)[victim.ip] == victim.attachment.mac
        assert _neighbours(dual.bridge)[liar.ip] == own
        assert _neighbours(dual.bridge)[target] == victim.attachment.mac
        await load(remove_script(dual.bridge))
        for lie in lies:
            wire.send(lie)
        assert _neighbours(dual.bridge)[target] == own


def _neighbours(bridge: str) -> dict[str, str]:
    shown = command("ip", "neighbour", "show", "dev", bridge)
    fields = [line.split() for line in shown.splitlines()]
    return {line[0]: line[line.index("lladdr") + 1] for line in fields if "lladdr" in line}


async def test_pods_keep_talking_while_the_agent_is_away_and_comes_back(node: Node) -> None:
    one, two = await node.pod("one"), await node.pod("two")
    with receive_on(two.namespace, 53) as server:
        await node.network.stop()
        assert exchange(one.namespace, server, (two.ip, 53)) == one.ip
        await node.restart()
        assert exchange(one.namespace, server, (two.ip, 53)) == one.ip
    assert node.network.attachment("one") == one.attachment
