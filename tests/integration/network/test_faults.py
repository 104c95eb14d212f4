from __future__ import annotations

import asyncio
import random
import signal
import socket
import sys
from ipaddress import ip_address
from pathlib import Path

import pytest

from host.errors import NotFoundError, PodkeelError
from network.attachment import PortMapping, interface_name
from network.rtnetlink import add_default_route
from tests.integration.network.conftest import Node, spare_subnet
from tests.integration.network.namespaces import command, listen, request, start, talk, wait_until
from tests.support.agent import SOON

_ATTACH_FOREVER = """
import asyncio, sys
from pathlib import Path
from host.database import Database
from network.attachment import AttachRequest, PortMapping, interface_name
from network.bridge.network import BuiltInNetwork
from network.rtnetlink import delete_link
from network.netlink import NETLINK_ROUTE
from network.netlink_socket import NetlinkSocket
from network.options import NetworkOptions
from network.schema import MIGRATIONS

async def main(store, bridge, cidr, *namespaces):
    database = Database(Path(store), {"network": MIGRATIONS})
    network = BuiltInNetwork(NetworkOptions(bridge=bridge, pod_cidrs=(cidr,), quarantine_seconds=0), database)
    links = NetlinkSocket(NETLINK_ROUTE)
    await network.start()
    print("ready", flush=True)

    async def churn(position, namespace):
        while True:
            sandbox_id = f"sandbox{position}"
            await network.attach(AttachRequest(sandbox_id, namespace, (PortMapping("tcp", 80, 22000 + position),)))
            await network.detach(sandbox_id)
            await asyncio.to_thread(links.request, [delete_link(interface_name(bridge, sandbox_id))])

    await asyncio.gather(*(churn(position, namespace) for position, namespace in enumerate(namespaces)))

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_missing_namespace_leaves_nothing(node: Node) -> None:
    with pytest.raises(NotFoundError, match="network namespace"):
        await node.network.attach(request("one", "/nowhere", [PortMapping("tcp", 80, 20080)]))
    await node.assert_empty()
    assert (await node.pod("two", PortMapping("tcp", 80, 20080))).ip


async def test_a_file_that_is_no_namespace_leaves_nothing(node: Node, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PodkeelError, match="sandbox one"):
        await node.network.attach(request("one", str(tmp_path / "file"), []))
    await node.assert_empty()


async def test_a_taken_interface_name_leaves_nothing(node: Node) -> None:
    namespace = node.namespace()
    namespace.command("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "other")
    with pytest.raises(PodkeelError, match="File exists"):
        await node.network.attach(request("one", str(namespace.path), [PortMapping("tcp", 80, 20080)]))
    await node.assert_empty()


async def test_a_failure_after_the_pair_was_made_leaves_nothing(dual: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    namespace = dual.namespace()
    elsewhere = ip_address("192.0.2.1")
    monkeypatch.setattr(
        "network.bridge.links.rtnetlink.add_default_route", lambda index, _: add_default_route(index, elsewhere)
    )
    with pytest.raises(PodkeelError, match=r"sandbox one .* unreachable"):
        await dual.network.attach(request("one", str(namespace.path), [PortMapping("tcp", 80, 20080)]))
    await dual.assert_empty()


async def test_cancellation_at_any_instant_leaves_nothing(node: Node) -> None:
    finished = 0
    for attempt in range(40):
        namespace = node.namespace()
        mappings = [PortMapping("tcp", 80, 20080)]
        task = asyncio.create_task(node.network.attach(request("one", str(namespace.path), mappings)))
        await asyncio.sleep(attempt * 0.0001)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            await node.assert_empty()
        else:
            finished += 1
            await node.network.repair([])
        namespace.close()
    assert finished < 40


async def test_a_start_after_kill_9_and_a_repair_leave_nothing(node: Node) -> None:
    await node.network.stop()
    namespaces = [node.namespace() for _ in range(3)]
    paths = [str(namespace.path) for namespace in namespaces]
    arguments = [
        sys.executable,
        "-c",
        _ATTACH_FOREVER,
        str(node.folder / "store.db"),
        node.bridge,
        f"{node.subnet}.0/24",
    ]
    found = 0
    for _ in range(6):
        child = start(*arguments, *paths, folder=Path(__file__).parents[3])
        assert child.stdout is not None
        with child.stdout:
            assert await asyncio.to_thread(child.stdout.readline) == b"ready\n"
            await asyncio.sleep(random.uniform(0.005, 0.1))
            assert child.poll() is None
            child.send_signal(signal.SIGKILL)
            child.wait()
        await node.restart()
        found += len(await node.network.repair([]))
        await node.assert_empty()
        await node.network.stop()
    assert found
    await node.network.start()
    assert (await node.pod("after", PortMapping("tcp", 80, 22000))).ip


async def test_a_leftover_link_of_the_same_sandbox_is_replaced(node: Node) -> None:
    name = interface_name(node.bridge, "one")
    command("ip", "link", "add", name, "type", "veth", "peer", "name", f"{node.bridge}p")
    pod = await node.pod("one")
    with listen(pod.namespace, 80) as server:
        assert talk(None, server, (pod.ip, 80)) == pod.attachment.gateways[0]


async def test_audit_lists_and_repair_removes_what_belongs_to_no_pod(node: Node) -> None:
    kept, gone = await node.pod("kept"), await node.pod("gone", PortMapping("tcp", 80, 20080))
    stray = interface_name(node.bridge, "stray")
    command("ip", "link", "add", stray, "type", "veth", "peer", "name", f"{node.bridge}p")
    command("ip", "address", "add", f"{spare_subnet()}.1/32", "dev", node.bridge)
    lie = f"{{ {stray} . {kept.attachment.mac} . {gone.ip} }}"
    command("nft", "add", "element", "bridge", node.bridge, "pods4", lie)
    findings = {(finding.kind, finding.object) for finding in await node.network.audit(["kept", "host network"])}
    assert findings == {
        ("attachment", "gone"),
        ("link", stray),
        ("bridge", node.bridge),
        ("nftables element", f"pods4: {stray} . {kept.attachment.mac} . {gone.ip}"),
    }
    await node.network.repair(["kept"])
    assert await node.network.audit(["kept"]) == []
    assert node.links() == [kept.attachment.host_interface]
    with listen(kept.namespace, 80) as server:
        assert talk(None, server, (kept.ip, 80))


async def test_a_flushed_ruleset_is_made_again_with_the_next_pod(node: Node) -> None:
    one = await node.pod("one", PortMapping("tcp", 80, 20080))
    for family in ("inet", "bridge"):
        command("nft", "delete", "table", family, node.bridge)
    await node.pod("two")
    assert await node.network.audit(["one", "two"]) == []
    with listen(one.namespace, 80) as server:
        talk(None, server, ("127.0.0.1", 20080))


@pytest.mark.parametrize("family", ["inet", "bridge"])
async def test_a_flushed_ruleset_is_made_again_without_another_pod(
    node: Node, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    pod = await node.pod("one", PortMapping("tcp", 80, 20080))
    await node.network.settled()
    monkeypatch.setattr("network.nftables.firewalls.LOOK_AGAIN_SECONDS", 0)
    command("nft", "delete", "table", family, node.bridge)
    assert node.network.condition().ready  # as kubelet asks every few seconds
    await node.network.settled()
    assert await node.network.audit(["one"]) == []
    with listen(pod.namespace, 80) as server:
        talk(None, server, ("127.0.0.1", 20080))


@pytest.mark.parametrize("by", ["restart", "repair"])
async def test_a_bridge_deleted_by_hand_is_made_again_with_its_pods(dual: Node, by: str) -> None:
    one, two = await dual.pod("one", PortMapping("tcp", 80, 20080)), await dual.pod("two")
    live = ["one", "two"]
    command("ip", "link", "delete", dual.bridge)
    problems = {(finding.kind, finding.object) for finding in await dual.network.audit(live)}
    assert ("bridge", dual.bridge) in problems
    assert {("link", name) for name in dual.links()} < problems
    if by == "restart":
        await dual.restart()
    else:
        await dual.network.repair(live)
    assert await dual.network.audit(live) == []
    with listen(one.namespace, 80) as server:
        assert talk(two.namespace, server, (one.ip, 80)) == two.ip
        talk(None, server, ("127.0.0.1", 20080))
        talk(one.namespace, server, (one.attachment.gateways[0], 20080))  # its own port: needs the port's hairpin mode
    with listen(one.namespace, 80, socket.AF_INET6) as server:
        assert talk(two.namespace, server, (one.address(6), 80)) == two.address(6)


@pytest.mark.parametrize("change", ["nomaster", "down"])
async def test_a_link_taken_off_the_bridge_or_down_comes_back(node: Node, change: str) -> None:
    pod = await node.pod("one")
    command("ip", "link", "set", pod.attachment.host_interface, change)
    (finding,) = await node.network.repair(["one"])
    assert (finding.object, "no port of bridge" in finding.problem) == (pod.attachment.host_interface, True)
    with listen(pod.namespace, 80) as server:
        assert talk(None, server, (pod.ip, 80))


async def test_a_bridge_that_is_down_comes_up(dual: Node) -> None:
    pod = await dual.pod("one")
    command("ip", "link", "set", dual.bridge, "down")
    assert "down" in [finding.problem for finding in await dual.network.repair(["one"])]
    assert await dual.network.audit(["one"]) == []
    for version, family in ((4, socket.AF_INET), (6, socket.AF_INET6)):
        with listen(pod.namespace, 80, family) as server:
            talk(None, server, (pod.address(version), 80))


@pytest.mark.parametrize("where", ["inside", "outside"])
async def test_a_lost_link_of_a_live_pod_is_made_again(dual: Node, where: str) -> None:
    pod, other = await dual.pod("one", PortMapping("tcp", 80, 20080)), await dual.pod("two")
    with listen(pod.namespace, 80) as server:
        if where == "inside":
            pod.namespace.command("ip", "link", "delete", "eth0")
        else:
            command("ip", "link", "delete", pod.attachment.host_interface)
        (finding,) = await dual.network.repair(["one", "two"])
        assert (finding.kind, finding.object) == ("link", pod.attachment.host_interface)
        assert await dual.network.audit(["one", "two"]) == []
        assert talk(other.namespace, server, (pod.ip, 80)) == other.ip
        talk(None, server, ("127.0.0.1", 20080))
    with listen(other.namespace, 80, socket.AF_INET6) as server:
        assert talk(pod.namespace, server, (other.address(6), 80)) == pod.address(6)


async def test_a_connection_outlives_the_loss_of_its_link(node: Node) -> None:
    pod = await node.pod("one")
    with listen(pod.namespace, 80) as server, socket.create_connection((pod.ip, 80), timeout=SOON) as client:
        connection, _ = server.accept()
        with connection:
            connection.settimeout(SOON)
            command("ip", "link", "delete", pod.attachment.host_interface)
            await node.network.repair(["one"])
            client.sendall(b"still there?")
            assert connection.recv(64) == b"still there?"


async def test_a_lost_link_without_a_namespace_is_reported(node: Node) -> None:
    pod = await node.pod("one")
    pod.namespace.close()
    await asyncio.to_thread(wait_until, lambda: node.links() == [])
    for _ in range(2):
        found = await node.network.repair(["one"])
        assert [(finding.kind, finding.object) for finding in found] == [("link", pod.attachment.host_interface)]
    await node.network.detach("one")
    await node.assert_empty()


async def test_pods_are_connected_while_lost_links_of_others_are_made_again(node: Node) -> None:
    lost = [await node.pod(f"old{number}") for number in range(4)]
    for pod in lost:
        command("ip", "link", "delete", pod.attachment.host_interface)
    namespaces = [node.namespace() for _ in range(20)]
    repair = asyncio.ensure_future(node.network.repair([f"old{number}" for number in range(4)]))
    attached = []
    for number, namespace in enumerate(namespaces):
        attached.append(asyncio.ensure_future(node.network.attach(request(f"new{number}", str(namespace.path), []))))
        await asyncio.sleep(0.002)
    await asyncio.wait_for(asyncio.gather(repair, *attached), SOON)
    live = [f"old{number}" for number in range(4)] + [f"new{number}" for number in range(20)]
    assert await node.network.audit(live) == []
