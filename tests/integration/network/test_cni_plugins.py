"""Debian's plugins, for real."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from host.errors import AlreadyExistsError
from network.attachment import Bandwidth, PortMapping
from tests.integration.network import frames
from tests.integration.network.cni import CniNode, clean_iptables, cni_node, iptables_rules
from tests.integration.network.conftest import Outside
from tests.integration.network.namespaces import (
    command,
    exchange,
    links_with,
    listen,
    mac_of,
    nft_tables,
    receive_on,
    talk,
    wait_until,
)
from tests.integration.network.test_bandwidth import is_limited_to, measured_rate
from tests.support.ports import free_port

__all__ = ["clean_iptables"]  # a fixture


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[CniNode]:
    async with cni_node(tmp_path) as made:
        yield made


async def test_bridge_portmap_bandwidth_tuning_and_loopback(clean_iptables: None, node: CniNode) -> None:
    node.configure(
        node.bridge_plugin(),
        {"type": "loopback"},
        {"type": "tuning", "sysctl": {"net.core.somaxconn": "777"}},
        {"type": "bandwidth", "capabilities": {"bandwidth": True}},
        {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True},
        disableCheck=True,  # these versions of portmap and bandwidth complain of pods that have no IPv6 and no limits
    )
    await node.start()
    assert node.network.condition().ready
    port = free_port()
    pod = await node.pod("server", PortMapping("tcp", 80, port), bandwidth=Bandwidth(ingress=40_000_000))
    other = await node.pod("client")
    assert pod.ip.startswith(f"{node.subnet}.")
    assert pod.attachment.mac == pod.namespace.run(lambda: mac_of("eth0"))
    assert pod.namespace.run(lambda: Path("/proc/sys/net/core/somaxconn").read_text().strip()) == "777"
    with listen(pod.namespace, 80) as server:
        assert talk(other.namespace, server, (pod.ip, 80)) == other.ip
        talk(None, server, (pod.ip, 80))
        talk(None, server, ("127.0.0.1", port))
        talk(pod.namespace, server, ("127.0.0.1", 80))
    assert is_limited_to(lambda: measured_rate(other.namespace, pod.namespace, pod.ip), 40_000_000)
    assert await node.network.audit(["server", "client"]) == []
    assert len(node.leases) == 2
    assert any(f"--dport {port}" in rule or f"--dports {port}" in rule for rule in iptables_rules())
    for sandbox_id in ("server", "client", "server", "never seen"):
        await node.network.detach(sandbox_id)
    assert node.leases == []
    assert node.rows() == 0
    assert not any(str(port) in rule for rule in iptables_rules())
    assert await node.network.audit([]) == []


@pytest.mark.parametrize("version", ["0.3.0", "0.3.1", "0.4.0", "1.0.0"])
async def test_ptp_from_a_file_of_one_plugin_in_every_version(node: CniNode, version: str) -> None:
    settings = {"cniVersion": version, "name": "single", "type": "ptp", "ipam": node.ipam()}
    (node.configurations / "10-ptp.conf").write_text(json.dumps(settings))
    await node.start()
    pod = await node.pod("one")
    with listen(pod.namespace, 80) as server:
        assert talk(None, server, (pod.ip, 80)) == f"{node.subnet}.1"
    assert await node.network.audit(["one"]) == []
    await node.network.detach("one")
    assert (node.leases, node.rows()) == ([], 0)


async def test_macvlan_without_a_gateway(node: CniNode) -> None:
    master = f"{node.bridge}m"
    command("ip", "link", "add", master, "type", "veth", "peer", "name", f"{master}p")
    try:
        for name in (master, f"{master}p"):
            command("ip", "link", "set", name, "up")
        node.configure({"type": "macvlan", "master": master, "ipam": node.ipam()}, version="0.4.0")
        await node.start()
        one, two = await node.pod("one"), await node.pod("two")
        with listen(one.namespace, 80) as server:
            assert talk(two.namespace, server, (one.ip, 80)) == two.ip
        await node.network.detach("one")
        await node.network.detach("two")
        assert node.leases == []
    finally:
        command("ip", "link", "delete", master)


async def test_two_families_from_the_ranges_kubelet_announced(node: CniNode) -> None:
    cidrs = (f"{node.subnet}.0/25", "fd00:206::/64")
    plugin = node.bridge_plugin(ipam=node.ipam(routes=[{"dst": "0.0.0.0/0"}]), capabilities={"ipRanges": True})
    node.configure(plugin)
    await node.start()
    await node.network.set_pod_cidrs(cidrs)
    await node.restart()
    pod = await node.pod("one")
    assert pod.ip.startswith(f"{node.subnet}.")
    second = pod.attachment.address(6)
    assert second is not None
    assert second.startswith("fd00:206::")


async def test_host_ports_without_a_plugin_for_them(node: CniNode, outside: Outside) -> None:
    node.configure(node.bridge_plugin())
    await node.start()
    tcp, udp = free_port(), free_port()
    pod = await node.pod("server", PortMapping("tcp", 80, tcp), PortMapping("udp", 53, udp))
    other = await node.pod("client")
    gateway = f"{node.subnet}.1"
    with listen(pod.namespace, 80) as server:
        talk(None, server, ("127.0.0.1", tcp))
        talk(None, server, (gateway, tcp))
        talk(other.namespace, server, (gateway, tcp))
        talk(pod.namespace, server, (gateway, tcp))
        assert talk(outside.namespace, server, (outside.node_ip, tcp)) == outside.ip
    with receive_on(pod.namespace, 53) as server:
        exchange(None, server, ("127.0.0.1", udp))
        assert exchange(outside.namespace, server, (outside.node_ip, udp)) == outside.ip
    with pytest.raises(AlreadyExistsError, match="is taken by sandbox server"):
        await node.pod("late", PortMapping("tcp", 80, tcp))
    assert node.rows() == 2
    live = ["server", "client"]
    assert await node.network.audit(live) == []
    table = f"{node.bridge}b_cni"
    command("nft", "delete", "table", "inet", table)
    assert [(finding.kind, finding.object) for finding in await node.network.audit(live)] == [("nftables table", table)]
    await node.restart(*live)
    assert await node.network.audit(live) == []
    with listen(pod.namespace, 80) as server:
        talk(None, server, ("127.0.0.1", tcp))
    await node.network.detach("server")
    with pytest.raises(ConnectionRefusedError):
        talk(None, server, ("127.0.0.1", tcp))
    await node.pod("late", PortMapping("tcp", 80, tcp))
    await node.network.destroy()
    assert table not in nft_tables()


async def test_host_ports_are_restored_when_the_node_s_rules_are_reloaded(node: CniNode) -> None:
    node.configure(node.bridge_plugin())
    await node.start()
    port = free_port()
    pod = await node.pod("server", PortMapping("tcp", 80, port))
    command("nft", "delete", "table", "inet", f"{node.bridge}b_cni")
    assert node.network.condition().ready  # as kubelet asks every few seconds
    await node.network.cni.settled()
    assert await node.network.audit(["server"]) == []
    with listen(pod.namespace, 80) as server:
        talk(None, server, ("127.0.0.1", port))


async def test_the_nodes_loopback_stays_closed_to_pods_after_the_last_host_port(node: CniNode) -> None:
    node.configure(node.bridge_plugin())
    await node.start()
    pod, _ = await node.pod("one"), await node.pod("server", PortMapping("tcp", 80, free_port()))
    await node.network.detach("server")
    await node.restart("one")
    gateway, bridge = f"{node.subnet}.1", mac_of(node.bridge)
    own = pod.attachment.mac
    with receive_on(None, 0, host="127.0.0.1") as private, receive_on(None, 0, host=gateway) as public:
        with pod.namespace.packet_socket() as wire:
            for server in (private, public):
                address, port = server.getsockname()
                wire.send(frames.udp((own, bridge), (pod.ip, address), port, b"from a pod"))
            assert public.recv(64) == b"from a pod"
            private.settimeout(0.1)
            with pytest.raises(TimeoutError):
                private.recv(64)
            command("nft", "delete", "table", "inet", f"{node.bridge}b_cni")
            wire.send(frames.udp((own, bridge), (pod.ip, "127.0.0.1"), private.getsockname()[1], b"from a pod"))
            assert private.recv(64) == b"from a pod"  # the control: it is the table that keeps it closed


async def test_ipv6_host_ports_without_a_plugin_for_them(node: CniNode, outside: Outside) -> None:
    node_ip, ip, tcp, udp = "fd00:beee::1", "fd00:beee::2", free_port(), free_port()
    command("ip", "address", "add", f"{node_ip}/64", "dev", outside.link, "nodad")
    outside.namespace.command("ip", "address", "add", f"{ip}/64", "dev", "eth0", "nodad")
    outside.namespace.command("ip", "route", "add", "default", "via", node_ip)
    routes = [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
    node.configure(node.bridge_plugin(ipam=node.ipam(routes=routes), capabilities={"ipRanges": True}))
    await node.start()
    await node.network.set_pod_cidrs((f"{node.subnet}.0/25", "fd00:206:1::/64"))
    mappings = (PortMapping("tcp", 80, tcp), PortMapping("udp", 53, udp), PortMapping("tcp", 80, tcp + 1, node_ip))
    pod, other = await node.pod("server", *mappings), await node.pod("client")
    second = other.attachment.address(6)
    assert second is not None
    gateway = "fd00:206:1::1"
    # The plugin has the kernel look for duplicates of the gateway's address.
    await asyncio.to_thread(wait_until, lambda: "tentative" not in command("ip", "address", "show", "dev", node.bridge))
    with listen(pod.namespace, 80, socket.AF_INET6) as server:
        assert talk(outside.namespace, server, (node_ip, tcp)) == ip
        assert talk(outside.namespace, server, (node_ip, tcp + 1)) == ip
        talk(other.namespace, server, (gateway, tcp))
        talk(pod.namespace, server, (gateway, tcp))
        talk(None, server, (gateway, tcp))
        for refused in ("::1", gateway):
            with pytest.raises(ConnectionRefusedError):
                talk(None, server, (refused, tcp if refused == "::1" else tcp + 1))
    with receive_on(pod.namespace, 53, socket.AF_INET6) as receiver:
        assert exchange(outside.namespace, receiver, (node_ip, udp)) == ip
        exchange(None, receiver, (gateway, udp))
    with listen(pod.namespace, 80) as server:
        talk(None, server, ("127.0.0.1", tcp))
    assert await node.network.audit(["server", "client"]) == []


async def test_check_reports_a_lost_interface(node: CniNode) -> None:
    node.configure(node.bridge_plugin())
    await node.start()
    pod = await node.pod("one")
    pod.namespace.command("ip", "link", "delete", "eth0")
    (finding,) = await node.network.audit(["one"])
    assert (finding.kind, finding.object) == ("CNI attachment", "one")
    assert "CNI plugin bridge, CHECK: failed with code" in finding.problem


async def test_the_network_of_a_missing_namespace_is_released(node: CniNode) -> None:
    node.configure(node.bridge_plugin())
    await node.start()
    pod = await node.pod("one")
    pod.namespace.close()
    await node.network.detach("one")
    assert (node.leases, node.rows()) == ([], 0)


async def test_pods_outlive_the_agent_and_their_configuration(node: CniNode) -> None:
    path = node.configure(node.bridge_plugin())
    await node.start()
    pod = await node.pod("one")
    path.unlink()
    await node.restart("one")
    assert node.network.attachment("one") == pod.attachment
    await node.network.detach("one")
    assert node.leases == []


async def test_a_burst_of_pods(node: CniNode) -> None:
    node.configure(node.bridge_plugin())
    await node.start()
    pods = await asyncio.gather(*(node.pod(f"pod{number}") for number in range(20)))
    assert len({pod.ip for pod in pods}) == 20
    await asyncio.gather(*(node.network.detach(f"pod{number}") for number in range(20)))
    assert (node.leases, node.rows()) == ([], 0)


async def test_a_start_releases_what_belongs_to_no_pod(node: CniNode) -> None:
    node.configure(node.bridge_plugin())
    await node.start()
    await node.pod("kept")
    await node.pod("gone")
    await node.network.stop()
    node.network = node.make()
    await node.network.start()
    (finding,) = await node.network.repair(["kept"])
    assert finding.object == "gone"
    await asyncio.to_thread(wait_until, lambda: node.told == ["gone"])
    assert node.rows() == 1
    assert len(node.leases) == 1
    assert links_with(node.bridge) == [node.bridge]
