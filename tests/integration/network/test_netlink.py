"""What the kernel has after each request: pyroute2 leaves out attributes that it does not know without a word."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator, Sequence
from ipaddress import ip_address, ip_interface
from pathlib import Path
from typing import Any

import pytest

from network import bandwidth, rtnetlink
from network.attachment import Attachment, Bandwidth
from network.netlink import NETLINK_ROUTE, Message
from network.netlink_socket import NetlinkSocket
from tests.integration.network.namespaces import Namespace, wait_until

_BRIDGE_MAC = bytes.fromhex("02000000aa01")
_POD_MAC = bytes.fromhex("02000000aa02")


class Bench:
    """A namespace with a bridge ``br0`` and one port ``port0`` whose peer ``eth0`` is in another namespace."""

    def __init__(self, outer: Namespace, inner: Namespace) -> None:
        self.outer, self.inner = outer, inner
        self.send(outer, rtnetlink.add_bridge("br0", _BRIDGE_MAC, 1400), rtnetlink.set_up("br0"))
        with open(inner.path, "rb") as pin:
            self.send(
                outer,
                rtnetlink.add_pair(
                    "port0", self.index("br0"), 1400, namespace=pin.fileno(), peer="eth0", peer_mac=_POD_MAC
                ),
            )

    def send(self, where: Namespace, *messages: Message) -> None:
        def work() -> None:
            with NetlinkSocket(NETLINK_ROUTE) as route:
                route.request(messages)

        where.run(work)

    def ask(self, question: Callable[[NetlinkSocket], Any]) -> Any:
        def work() -> Any:
            with NetlinkSocket(NETLINK_ROUTE) as route:
                return question(route)

        return self.outer.run(work)

    def index(self, name: str) -> int:
        return self.outer.run(lambda: socket.if_nametoindex(name))

    def shown(self, *command: str, inside: bool = False) -> list[dict[str, Any]]:
        output = (self.inner if inside else self.outer).command(*command)
        found: list[dict[str, Any]] = json.loads(output or "[]")
        return found

    def link(self, name: str, *, inside: bool = False) -> dict[str, Any]:
        return self.shown("ip", "-d", "-j", "link", "show", name, inside=inside)[0]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    namespaces = [Namespace(tmp_path / "outer"), Namespace(tmp_path / "inner")]
    try:
        yield Bench(*namespaces)
    finally:
        for namespace in namespaces:
            namespace.close()


def test_a_bridge_forwards_at_once_and_learns_nothing_from_link_local_frames(bench: Bench) -> None:
    made = bench.link("br0")
    assert (made["address"], made["mtu"], "UP" in made["flags"]) == ("02:00:00:00:aa:01", 1400, True)
    assert made["linkinfo"]["info_data"]["no_linklocal_learn"] == 0
    bench.send(bench.outer, rtnetlink.configure_bridge("br0"))
    data = bench.link("br0")["linkinfo"]["info_data"]
    expected = {"forward_delay": 0, "stp_state": 0, "mcast_snooping": 0, "no_linklocal_learn": 1}
    assert {name: data[name] for name in expected} == expected


def test_a_pair_has_its_ends_where_they_belong(bench: Bench) -> None:
    host, pod = bench.link("port0"), bench.link("eth0", inside=True)
    assert (host["master"], host["mtu"], host["linkinfo"]["info_kind"]) == ("br0", 1400, "veth")
    assert (pod["address"], pod["mtu"], pod["linkinfo"]["info_kind"]) == ("02:00:00:00:aa:02", 1400, "veth")


@pytest.mark.parametrize("generate_address", [True, False])
def test_a_bridge_port_is_in_hairpin_mode_and_has_no_address(bench: Bench, generate_address: bool) -> None:
    before = bench.link("port0")
    assert before["linkinfo"]["info_slave_data"]["hairpin"] is False
    assert before["inet6_addr_gen_mode"] == "eui64"
    bench.send(bench.outer, rtnetlink.configure_port("port0", generate_address=generate_address))
    after = bench.link("port0")
    assert after["linkinfo"]["info_slave_data"]["hairpin"] is True
    assert after["inet6_addr_gen_mode"] == ("eui64" if generate_address else "none")


def test_links_are_changed_by_name(bench: Bench) -> None:
    bench.send(
        bench.outer,
        rtnetlink.keep_without_generated_address("port0"),
        rtnetlink.set_up("port0", 1300),
        rtnetlink.set_alias("port0", "words of ours"),
    )
    changed = bench.link("port0")
    assert changed["inet6_addr_gen_mode"] == "none"
    assert (changed["mtu"], changed["ifalias"], "UP" in changed["flags"]) == (1300, "words of ours", True)
    bench.outer.command("ip", "link", "set", "port0", "nomaster")
    bench.send(bench.outer, rtnetlink.attach_port("port0", bench.index("br0")))
    assert bench.link("port0")["master"] == "br0"
    bench.send(bench.outer, rtnetlink.delete_link("port0"))
    assert [link["ifname"] for link in bench.shown("ip", "-j", "link")] == ["lo", "br0"]


def test_addresses_come_and_go(bench: Bench) -> None:
    index = bench.index("br0")
    wanted = [ip_interface("10.9.0.1/16"), ip_interface("10.9.0.1/24"), ip_interface("fd09::1/64")]
    bench.send(bench.outer, *(rtnetlink.add_address(index, address) for address in wanted))
    shown = bench.shown("ip", "-j", "addr", "show", "br0", "scope", "global")[0]["addr_info"]
    assert [(a["local"], a["prefixlen"], a.get("nodad", False), a.get("address")) for a in shown] == [
        ("10.9.0.1", 16, False, None),
        ("10.9.0.1", 24, False, None),
        ("fd09::1", 64, True, None),
    ]
    assert set(wanted) <= {address for owner, address in bench.ask(rtnetlink.list_addresses) if owner == index}
    bench.send(bench.outer, *(rtnetlink.delete_address(index, address) for address in wanted[1:]))
    shown = bench.shown("ip", "-j", "addr", "show", "br0", "scope", "global")[0]["addr_info"]
    assert [(a["local"], a["prefixlen"]) for a in shown] == [("10.9.0.1", 16)]


@pytest.mark.parametrize(("pod", "gateway"), [("10.9.0.7/32", "10.9.0.1"), ("fd09::7/128", "fd09::1")])
def test_a_pod_reaches_everything_by_its_gateway(bench: Bench, pod: str, gateway: str) -> None:
    index = bench.inner.run(lambda: socket.if_nametoindex("eth0"))
    bench.send(bench.outer, rtnetlink.set_up("port0"))
    bench.send(
        bench.inner,
        rtnetlink.set_up("eth0"),
        rtnetlink.add_address(index, ip_interface(pod)),
        rtnetlink.add_neighbour_route(index, ip_address(gateway)),
        rtnetlink.add_default_route(index, ip_address(gateway)),
    )
    family = "-6" if ":" in pod else "-4"
    routes = {route["dst"]: route for route in bench.shown("ip", family, "-j", "-N", "route", inside=True)}
    default, neighbour = routes["default"], routes[gateway]
    assert (default["gateway"], default["dev"], default["protocol"]) == (gateway, "eth0", "4")
    assert (neighbour["dev"], neighbour["protocol"]) == ("eth0", "4")
    if family == "-4":
        assert neighbour["scope"] == "253"

    def asked() -> tuple[bool, bool, int]:
        with NetlinkSocket(NETLINK_ROUTE) as route:
            away = ip_address("192.0.2.1" if family == "-4" else "2001:db8::1")
            # The kernel finishes adding an IPv6 address in the background.
            wait_until(lambda: rtnetlink.is_local(route, ip_interface(pod).ip))
            return True, rtnetlink.is_local(route, away), rtnetlink.outgoing_interface(route, away)

    assert bench.inner.run(asked) == (True, False, index)


@pytest.mark.parametrize("address", ["10.9.0.7", "fd09::7"])
def test_a_neighbour_is_forgotten(bench: Bench, address: str) -> None:
    bench.outer.command("ip", "neigh", "add", address, "lladdr", "02:00:00:00:00:07", "dev", "br0")
    bench.send(bench.outer, rtnetlink.forget_neighbour(bench.index("br0"), ip_address(address)))
    left = [found for found in bench.shown("ip", "-j", "neigh", "show") if found.get("state") != ["FAILED"]]
    assert address not in {found["dst"] for found in left}


def test_links_are_reported_as_links(bench: Bench) -> None:
    bench.send(bench.outer, rtnetlink.set_up("port0"), rtnetlink.set_alias("br0", "näme"))
    bench.send(bench.inner, rtnetlink.set_up("eth0"))
    # A name need not be UTF-8, and a tunnel has no MAC.
    bench.outer.command("ip", "link", "add", b"pkt\xff".decode(errors="surrogateescape"), "type", "bridge")
    bench.outer.command("ip", "tuntap", "add", "tunnel0", "mode", "tun")
    bridge = bench.ask(lambda route: rtnetlink.find_link(route, "br0"))
    assert (bridge.kind, bridge.mac, bridge.alias, bridge.up) == ("bridge", _BRIDGE_MAC, "näme", True)
    links: Sequence[rtnetlink.Link] = bench.ask(rtnetlink.list_links)
    assert {"lo", "br0", "port0", "pkt\udcff", "tunnel0"} <= {link.name for link in links}
    assert bench.ask(lambda route: [p.name for p in rtnetlink.list_ports(route, bridge.index)]) == ["port0"]
    assert bench.ask(lambda route: rtnetlink.passes_frames(route, "port0"))
    assert not bench.ask(lambda route: rtnetlink.passes_frames(route, "tunnel0"))


@pytest.mark.parametrize("rate", [1_000, 5_000_000, 40_000_000_000, 10**15])
def test_limits_are_as_asked(bench: Bench, rate: int) -> None:
    """40 Gbit/s is more bytes a second than 32 bits hold."""
    attachment = Attachment(
        sandbox_id="one",
        host_interface="port0",
        limiter="limit0",
        addresses=("10.9.0.7",),
        gateways=("10.9.0.1",),
        mac="02:00:00:00:aa:02",
        mtu=1400,
        bandwidth=Bandwidth(ingress=rate, egress=rate),
    )

    def work() -> None:
        with NetlinkSocket(NETLINK_ROUTE) as route:
            bandwidth.limit(route, attachment)

    bench.outer.run(work)
    limiter = bench.link("limit0")
    assert (limiter["linkinfo"]["info_kind"], limiter["mtu"], "UP" in limiter["flags"]) == ("ifb", 1400, True)
    for name in ("port0", "limit0"):
        [bucket] = [q for q in bench.shown("tc", "-j", "qdisc", "show", "dev", name) if q["kind"] == "tbf"]
        options = bucket["options"]
        assert (bucket["handle"], bucket["root"], options["rate"]) == ("1:", True, rate // 8)
        # The kernel keeps the burst as the time it takes, in units of 64 ns.
        assert options["burst"] == pytest.approx(bandwidth.burst_bytes(rate, 1400), rel=0.02, abs=rate // 8 * 64e-9)
    [redirect] = [
        found["options"]
        for found in bench.shown("tc", "-j", "filter", "show", "dev", "port0", "ingress")
        if "actions" in found.get("options", {})
    ]
    [action] = redirect["actions"]
    assert (action["kind"], action["mirred_action"], action["direction"]) == ("mirred", "redirect", "egress")
    assert (action["to_dev"], action["control_action"]["type"]) == ("limit0", "stolen")


class Interrupted(NetlinkSocket):
    """Something deletes a link once the first datagram of the first answer has come."""

    def __init__(self, doomed: str) -> None:
        super().__init__(NETLINK_ROUTE)
        self._doomed = [doomed]

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        yield from list(super()._receive())
        while self._doomed:
            with NetlinkSocket(NETLINK_ROUTE) as other:
                other.request([rtnetlink.delete_link(self._doomed.pop())])


def test_a_dump_during_which_links_change_is_asked_for_again(bench: Bench) -> None:
    """The kernel sends them in parts, and marks those between which something has changed (NLM_F_DUMP_INTR)."""
    names = [f"d{number}" for number in range(100)]  # several datagrams
    bench.send(bench.outer, *(rtnetlink.add_ifb(name, 1400) for name in names))

    def work() -> None:
        with Interrupted("br0") as route:
            found = [link.name for link in rtnetlink.list_links(route)]
        assert "br0" not in found
        assert set(names) < set(found)

    bench.outer.run(work)


def test_more_refusals_than_fit_are_an_error_of_their_request_alone(bench: Bench) -> None:
    def work() -> None:
        with NetlinkSocket(NETLINK_ROUTE) as route:
            with pytest.raises(OSError, match="No buffer space available"):
                route.request([rtnetlink.delete_link("pktnowhere")] * 2000)
            assert rtnetlink.find_link(route, "lo").index == 1

    bench.outer.run(work)
    with NetlinkSocket(NETLINK_ROUTE) as route:  # here we may have larger buffers
        route.allow_large_batches()
        assert len(route.exchange([rtnetlink.delete_link("pktnowhere")] * 2000)) == 2000
