from __future__ import annotations

import errno
import os
import socket
import struct
from ipaddress import ip_address, ip_interface

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.process import ChildProcess

from network import rtnetlink
from network.attachment import Attachment, PortMapping, interface_name, interface_prefix, link_local, pod_mac
from network.netlink import NETLINK_ROUTE, LinkMessage, Reader, message
from network.netlink_socket import NetlinkSocket
from network.nftables.elements import elements_of


@given(st.binary(max_size=200))
def test_rubbish_from_a_kernel_is_left_out(rubbish: bytes) -> None:
    read = Reader(LinkMessage, "IFLA_IFNAME", "IFLA_MASTER")
    answer = read(struct.pack("=BxHiII", 0, 1, 7, 1, 0) + rubbish)
    assert answer["index"] == 7
    known = {"IFLA_IFNAME", "IFLA_MASTER"}
    assert {name for name, *_ in (slot[:] for slot in answer["attrs"])} <= known


def test_an_answer_that_is_too_short_is_an_error() -> None:
    with pytest.raises(struct.error):
        Reader(LinkMessage, "IFLA_IFNAME")(b"\0\0")


def test_attributes_are_read_back_by_name() -> None:
    sent = message(LinkMessage, 16, 0, [("IFLA_IFNAME", "one"), ("IFLA_MTU", 1400), ("IFLA_MASTER", 3)], {"index": 9})
    answer = Reader(LinkMessage, "IFLA_IFNAME", "IFLA_MASTER")(sent.body)
    assert (answer["index"], answer.get_attr("IFLA_IFNAME"), answer.get_attr("IFLA_MASTER")) == (9, "one", 3)
    assert answer.get_attr("IFLA_MTU") is None


@pytest.mark.parametrize(
    "attribute",
    [
        ("IFLA_BR_STP_STATE", 0),
        ("IFLA_LINKINFO", {"attrs": [("IFLA_MTU", 1)]}),
        (
            "IFLA_LINKINFO",
            {"attrs": [("IFLA_INFO_KIND", "bridge"), ("IFLA_INFO_DATA", {"attrs": [("IFLA_BR_MULTI_BOOL", 1)]})]},
        ),
    ],
)
def test_an_attribute_that_pyroute2_would_leave_out_is_an_error(attribute: tuple[str, object]) -> None:
    with pytest.raises(ValueError, match="has no attribute"):
        message(LinkMessage, 16, 0, [attribute])


def test_nothing_of_pyroute2_can_fork() -> None:
    process = ChildProcess(os.getpid, [])
    with pytest.raises(TypeError, match="unsupported mode"):
        process.run()
    process.ctrl_r.close()
    process.ctrl_w.close()


def test_what_another_process_sends_is_no_answer() -> None:
    """A process with CAP_NET_ADMIN may send to any netlink socket of its namespace."""
    answer = message(LinkMessage, 16, 0, [("IFLA_IFNAME", "pktlie")], {"index": 4711})
    with NetlinkSocket(NETLINK_ROUTE) as route, socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as liar:
        liar.bind((0, 0))
        packed = b"".join(
            struct.pack("=IHHII", 16 + len(answer.body), answer.kind, 0, sequence, 0) + answer.body
            for sequence in range(1, 20)
        )
        try:
            liar.sendto(packed, (route.port_id, 0))
        except PermissionError:
            pytest.skip("needs CAP_NET_ADMIN")
        assert [link.name for link in rtnetlink.list_links(route) if link.index == 4711] == []
        assert rtnetlink.find_link(route, "lo").index == 1


def test_the_kernel_answers_and_refuses_by_position() -> None:
    with NetlinkSocket(NETLINK_ROUTE) as route:
        loopback = rtnetlink.find_link(route, "lo")
        assert (loopback.index, loopback.name, loopback.mac, loopback.master) == (1, "lo", bytes(6), 0)
        assert loopback in rtnetlink.list_links(route)
        assert (1, ip_interface("127.0.0.1/8")) in rtnetlink.list_addresses(route)
        assert rtnetlink.is_local(route, ip_address("127.0.0.1"))
        with pytest.raises(OSError, match="No such device"):
            rtnetlink.find_link(route, "pktnowhere")
        [refusal] = route.exchange([rtnetlink.set_up("pktnowhere")])
        assert refusal.position == 0
        assert refusal.number in (errno.ENODEV, errno.EPERM)


def test_a_closed_socket_is_an_error_not_a_hang() -> None:
    route = NetlinkSocket(NETLINK_ROUTE)
    route.close()
    route.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        rtnetlink.find_link(route, "lo")


def test_interface_names_fit_and_differ_between_bridges() -> None:
    names = {interface_name(bridge, f"sandbox{n}") for bridge in ("podkeel0", "podkeel1") for n in range(500)}
    assert len(names) == 1000
    assert all(len(name) <= 15 for name in names)
    assert interface_name("podkeel0", "a").startswith(interface_prefix("podkeel0"))
    assert interface_prefix("podkeel0") != interface_prefix("podkeel1")


@pytest.mark.parametrize("address", ["10.88.1.2", "fd00::1:2"])
def test_pod_macs_are_local_unicast_and_unique(address: str) -> None:
    first, second = pod_mac(ip_address(address)), pod_mac(ip_address(address) + 1)
    assert first != second
    assert int(first[:2], 16) & 3 == 2


def test_link_local_is_modified_eui_64() -> None:
    assert str(link_local("0a:58:0a:cb:00:02")) == "fe80::858:aff:fecb:2"


def test_a_pods_elements() -> None:
    attachment = Attachment(
        sandbox_id="one",
        host_interface="pk0123456789abc",
        addresses=("10.88.0.2", "fd00::2"),
        gateways=("10.88.0.1", "fd00::1"),
        mac="0a:58:0a:58:00:02",
        mtu=1500,
        host_ports=(PortMapping("tcp", 80, 8080), PortMapping("udp", 53, 5353, "127.0.0.1")),
    )
    written = [(element.family, element.set_name, str(element)) for element in elements_of(attachment)]
    identity = "pk0123456789abc . 0a:58:0a:58:00:02"
    assert written == [
        ("bridge", "pods4", f"{identity} . 10.88.0.2"),
        ("bridge", "pods6", f"{identity} . fd00::2"),
        ("bridge", "targets6", f"{identity} . 0x{'fd00' + '0' * 27 + '2'}"),
        ("bridge", "pods6", f"{identity} . fe80::858:aff:fe58:2"),
        ("bridge", "targets6", f"{identity} . 0xfe800000000000000858" + "0afffe580002"),
        ("inet", "any_ports4", "6 . 8080 : 10.88.0.2 . 80"),
        ("inet", "any_ports6", "6 . 8080 : fd00::2 . 80"),
        ("inet", "ports4", "17 . 127.0.0.1 . 5353 : 10.88.0.2 . 53"),
        ("inet", "itself4", "10.88.0.2 . 10.88.0.2"),
        ("inet", "itself6", "fd00::2 . fd00::2"),
    ]
    assert attachment.address(6) == "fd00::2"
    assert socket.inet_aton("10.88.0.2") == elements_of(attachment)[0].key[2].packed
