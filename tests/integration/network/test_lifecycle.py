from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from host.errors import AlreadyExistsError, InvalidArgumentError, LimitError, UnavailableError, WrongStateError
from network.attachment import PortMapping, interface_name
from tests.integration.network.conftest import Node, running_node, spare_subnet
from tests.integration.network.namespaces import (
    command,
    descriptors,
    exchange,
    listen,
    nft_tables,
    receive_on,
    request,
    talk,
    wait_until,
)


async def test_detach_is_repeatable_and_takes_everything(node: Node) -> None:
    pod = await node.pod("one", PortMapping("tcp", 80, 20080))
    await node.network.detach("one")
    await node.network.detach("one")
    await node.network.detach("never seen")
    assert node.network.attachment("one") is None
    pod.namespace.close()
    await _links_gone(node)
    await node.assert_empty()


async def test_detach_works_when_the_namespace_is_gone(node: Node) -> None:
    pod = await node.pod("one")
    pod.namespace.close()
    await _links_gone(node)
    await node.network.detach("one")
    await node.assert_empty()


async def test_a_detached_pod_can_send_nothing(node: Node) -> None:
    pod = await node.pod("one")
    await node.network.detach("one")
    with receive_on(None, 0, host=pod.attachment.gateways[0]) as server, pytest.raises(TimeoutError):
        server.settimeout(0.2)
        exchange(pod.namespace, server, server.getsockname())


async def _links_gone(node: Node, name: str = "") -> None:
    """Wait for the kernel to take down the pairs of namespaces that ended."""
    await asyncio.to_thread(wait_until, lambda: not any(link.startswith(name) for link in node.links()))


async def test_fifty_pods_at_once(node: Node) -> None:
    namespaces = [node.namespace() for _ in range(50)]
    attachments = await asyncio.gather(
        *(
            node.network.attach(request(f"pod{number}", str(namespace.path), [PortMapping("tcp", 80, 21000 + number)]))
            for number, namespace in enumerate(namespaces)
        )
    )
    assert len({attachment.addresses for attachment in attachments}) == 50
    assert await node.network.audit([f"pod{number}" for number in range(50)]) == []
    with listen(namespaces[7], 80) as server:
        assert talk(namespaces[42], server, (attachments[7].addresses[0], 80)) == attachments[42].addresses[0]
    await asyncio.gather(*(node.network.detach(f"pod{number}") for number in range(50)))
    for namespace in namespaces:
        namespace.close()
    await _links_gone(node)
    await node.assert_empty()


async def test_tables_made_again_while_pods_come_and_go_lose_nothing(node: Node) -> None:
    names = [f"pod{number}" for number in range(24)]
    namespaces = [node.namespace() for _ in names]

    async def come_and_maybe_go(number: int) -> None:
        await node.network.attach(request(names[number], str(namespaces[number].path), []))
        if number % 2:
            await node.network.detach(names[number])
            namespaces[number].close()

    async def make_again() -> None:
        for _ in range(3):
            await node.network.repair(names)

    await asyncio.gather(make_again(), *(come_and_maybe_go(number) for number in range(len(names))))
    gone = [interface_name(node.bridge, name) for name in names[1::2]]
    await asyncio.to_thread(wait_until, lambda: not set(gone) & set(node.links()))
    assert await node.network.audit(names) == []
    assert len(node.links()) == 12


async def test_the_mtu_is_that_of_the_uplink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = f"pktm{tmp_path.name[-6:]}"
    command("ip", "link", "add", link, "mtu", "1400", "type", "veth", "peer", "name", f"{link}p")
    try:
        monkeypatch.setattr("network.sysctl.uplink", lambda: link)  # the machine's own routes stay as they are
        async with running_node(tmp_path, mtu=0) as node:
            pod = await node.pod("one")
            assert pod.attachment.mtu == 1400
            assert "mtu 1400" in pod.namespace.command("ip", "link", "show", "eth0")
            for name in (node.bridge, pod.attachment.host_interface):
                assert "mtu 1400" in command("ip", "link", "show", name)
    finally:
        command("ip", "link", "delete", link)


async def test_after_a_reboot_addresses_and_ports_are_held_until_released(node: Node) -> None:
    """What a reboot takes: links, namespaces and tables. What it leaves: the store."""
    mapping = PortMapping("tcp", 80, 20080)
    pods = [await node.pod("stays", mapping), await node.pod("goes")]
    await node.network.stop()
    for pod in pods:
        pod.namespace.close()
    command("ip", "link", "delete", node.bridge)
    for family in ("inet", "bridge"):
        command("nft", "delete", "table", family, node.bridge)
    await _links_gone(node)
    node.network = node.make()
    await node.network.start()
    await node.network.repair(["stays"])
    assert node.rows() == {"attachments": 1, "host_ports": 1, "addresses": 1}
    assert (await node.pod("new")).ip not in {pod.ip for pod in pods}
    with pytest.raises(AlreadyExistsError):
        await node.pod("late", mapping)
    await node.network.detach("stays")
    await node.pod("late", mapping)
    assert await node.network.audit(["new", "late"]) == []


async def test_exhaustion_names_the_range_and_leaves_nothing(tmp_path: Path) -> None:
    subnet = spare_subnet()
    async with running_node(tmp_path, pod_cidrs=(f"{subnet}.0/29",)) as node:
        for number in range(5):
            await node.pod(f"pod{number}")
        with pytest.raises(LimitError, match=rf"{subnet}\.0/29 \(5 in use, 0 in quarantine\)"):
            await node.pod("late")
        assert node.rows()["attachments"] == 5
        await node.network.detach("pod0")
        with pytest.raises(LimitError, match="1 in quarantine"):
            await node.pod("late")
        await node.restart()
        with pytest.raises(LimitError, match="1 in quarantine"):
            await node.pod("late")
        await node.restart(quarantine_seconds=0.0)
        assert (await node.pod("late")).ip == f"{subnet}.2"


async def test_a_second_range_is_used_when_the_first_is_full(tmp_path: Path) -> None:
    subnet = spare_subnet()
    async with running_node(tmp_path, pod_cidrs=(f"{subnet}.0/30", f"{subnet}.8/30")) as node:
        one, two = await node.pod("one"), await node.pod("two")
        assert (one.ip, two.ip) == (f"{subnet}.2", f"{subnet}.10")
        with listen(two.namespace, 80) as server:
            assert talk(one.namespace, server, (two.ip, 80)) == one.ip


async def test_addresses_are_given_out_in_rotation_also_after_a_restart(node: Node) -> None:
    seen = []
    for number in range(3):
        seen.append((await node.pod(f"pod{number}")).ip)
        await node.network.detach(f"pod{number}")
    await node.restart(quarantine_seconds=0.0)
    seen.append((await node.pod("last")).ip)
    assert seen == [f"{node.subnet}.{number}" for number in (2, 3, 4, 5)]


async def test_an_address_is_found_at_once_at_the_mac_of_its_next_pod(tmp_path: Path) -> None:
    ranges = (f"{spare_subnet()}.0/24", "fd00:207:1::/126")
    async with running_node(tmp_path, pod_cidrs=ranges, quarantine_seconds=0.0) as node:
        pods = []
        for name in ("first", "other", "next"):
            pods.append(pod := await node.pod(name))
            with listen(pod.namespace, 80, socket.AF_INET6) as server:
                talk(None, server, (pod.address(6), 80))
            await node.network.detach(name)
        first, _, last = pods
        assert first.address(6) == last.address(6)
        assert first.attachment.mac != last.attachment.mac


async def test_pod_cidrs_from_the_kubelet_are_used_and_remembered(node: Node) -> None:
    old, subnet = await node.pod("old"), spare_subnet()
    announced = (f"{subnet}.0/28", "fd00:207::/64")
    await node.network.set_pod_cidrs(announced)
    new = await node.pod("new")
    assert new.attachment.addresses == (f"{subnet}.2", "fd00:207::2")
    with listen(old.namespace, 80) as server:
        assert talk(new.namespace, server, (old.ip, 80)) == new.ip
    await node.restart()
    assert node.network.pod_cidrs == announced
    assert (await node.pod("newer")).ip == f"{subnet}.3"
    assert await node.network.audit(["old", "new", "newer"]) == []
    await node.network.detach("old")
    old.namespace.close()
    await _links_gone(node, old.attachment.host_interface)
    await node.restart()
    assert await node.network.audit(["new", "newer"]) == []


async def test_pod_cidrs_may_overlap_those_before(dual: Node) -> None:
    old = await dual.pod("old")
    assert (old.address(4)[-2:], old.address(6)[-3:]) == (".2", "::2")
    await dual.network.set_pod_cidrs([f"{old.address(4)[:-2]}.0/28", f"{old.address(6)[:-3]}::/120"])
    new = await dual.pod("new")
    assert new.attachment.addresses == (f"{old.address(4)[:-2]}.3", f"{old.address(6)[:-3]}::3")
    for version, family in ((4, socket.AF_INET), (6, socket.AF_INET6)):
        with listen(old.namespace, 80, family) as server:
            assert talk(new.namespace, server, (old.address(version), 80)) == new.address(version)
            talk(None, server, (old.address(version), 80))
    assert await dual.network.audit(["old", "new"]) == []
    await dual.network.detach("old")
    old.namespace.close()
    await _links_gone(dual, old.attachment.host_interface)
    await dual.restart()
    assert await dual.network.audit(["new"]) == []
    with listen(new.namespace, 80, socket.AF_INET6) as server:
        talk(None, server, (new.address(6), 80))


@pytest.mark.parametrize(
    "cidrs",
    [
        [],
        ["rubbish"],
        ["10.207.252.1/24"],
        ["10.207.252.0/31"],
        ["10.207.252.0/24", "10.207.252.0/25"],
        ["127.0.0.0/8"],
    ],
)
async def test_bad_pod_cidrs_change_nothing(node: Node, cidrs: list[str]) -> None:
    with pytest.raises(InvalidArgumentError):
        await node.network.set_pod_cidrs(cidrs)
    assert node.network.pod_cidrs == (f"{node.subnet}.0/24",)
    assert (await node.pod("one")).ip == f"{node.subnet}.2"


async def test_a_sandbox_is_connected_once(node: Node) -> None:
    pod = await node.pod("one")
    with pytest.raises(AlreadyExistsError):
        await node.pod("one")
    assert node.network.attachment("one") == pod.attachment
    assert await node.network.audit(["one"]) == []


async def test_the_condition_says_what_is_wrong(node: Node) -> None:
    assert node.network.condition().ready
    command("ip", "link", "delete", node.bridge)
    condition = node.network.condition()
    assert (condition.ready, condition.reason) == (False, "BridgeMissing")
    with pytest.raises(UnavailableError):
        await node.pod("one")
    assert {finding.problem for finding in await node.network.audit([])} == {"missing"}
    await node.network.repair([])
    assert node.network.condition().ready
    await node.network.stop()
    assert not node.network.condition().ready


async def test_a_bridge_of_another_program_is_not_changed(node: Node) -> None:
    name = f"{node.bridge}x"
    command("ip", "link", "add", name, "type", "bridge")
    try:
        network = node.make(bridge=name)
        with pytest.raises(WrongStateError, match=name):
            await network.start()
        assert not network.condition().ready
        await network.stop()
        shown = command("ip", "address", "show", name)
        assert "inet" not in shown
    finally:
        command("ip", "link", "delete", name)


async def test_destroy_leaves_nothing(node: Node) -> None:
    await node.pod("one", PortMapping("tcp", 80, 20080))
    await node.network.destroy()
    assert node.links() == []
    assert node.bridge not in nft_tables()
    assert set(node.rows().values()) == {0}
    assert node.database.read("SELECT * FROM network_addresses") == []


async def test_no_descriptor_stays_open(node: Node) -> None:
    await node.pod("warm")
    await node.network.settled()  # nft runs in the background, with pipes
    before = descriptors()
    for number in range(5):
        pod = await node.pod(f"pod{number}", PortMapping("udp", 80, 20080))
        await node.network.detach(f"pod{number}")
        pod.namespace.close()
    await node.network.audit([])
    assert descriptors() == before
