"""The rtnetlink requests (rtnetlink(7)) for the bridge, a pod's veth pair, its addresses and its routes.

The functions that return a message change something: many of them are sent at once (``NetlinkSocket.request``). The
functions that take a socket ask the kernel and block.
"""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, ip_interface

from network.netlink import (
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Message,
    NetlinkSocket,
    attribute,
    attributes,
    nested,
    number32,
    text,
)

IPAddress = IPv4Address | IPv6Address
IPInterface = IPv4Interface | IPv6Interface

_IF_OPER_UP = 6

_RTM_NEWLINK = 16
_RTM_DELLINK = 17
_RTM_GETLINK = 18
_RTM_SETLINK = 19
_RTM_NEWADDR = 20
_RTM_DELADDR = 21
_RTM_GETADDR = 22
_RTM_NEWROUTE = 24
_RTM_GETROUTE = 26
_RTM_DELNEIGH = 29

_IFF_UP = 1
_IFLA_ADDRESS = 1
_IFLA_IFNAME = 3
_IFLA_MTU = 4
_IFLA_MASTER = 10
_IFLA_OPERSTATE = 16
_IFLA_IFALIAS = 20
_IFLA_LINKINFO = 18
_IFLA_AF_SPEC = 26
_IFLA_NET_NS_FD = 28
_IFLA_INFO_KIND = 1
_IFLA_INFO_DATA = 2
_IFLA_INFO_SLAVE_KIND = 4
_IFLA_INFO_SLAVE_DATA = 5
_VETH_INFO_PEER = 1
_IFLA_BR_FORWARD_DELAY = 1
_IFLA_BR_STP_STATE = 5
_IFLA_BR_MCAST_SNOOPING = 23
_IFLA_BR_MULTI_BOOLOPT = 46
_BR_NO_LINK_LOCAL_LEARNING = 1
_IFLA_BRPORT_MODE = 4
_IFLA_INET6_ADDR_GEN_MODE = 8
_IN6_ADDR_GEN_MODE_NONE = 1

_IFA_ADDRESS = 1
_IFA_LOCAL = 2
_IFA_F_NODAD = 0x02
_SCOPE_UNIVERSE = 0
_SCOPE_LINK = 253

_NDA_DST = 1
_RTA_DST = 1
_RTA_OIF = 4
_RTA_GATEWAY = 5
_RT_TABLE_MAIN = 254
_RTPROT_STATIC = 4
_RTN_UNICAST = 1
_RTN_LOCAL = 2


def add_bridge(name: str, mac: bytes, mtu: int) -> Message:
    """Make a bridge; ``configure_bridge`` says how it works."""
    kind = nested(_IFLA_LINKINFO, text(_IFLA_INFO_KIND, "bridge"))
    body = _interface() + text(_IFLA_IFNAME, name) + attribute(_IFLA_ADDRESS, mac) + number32(_IFLA_MTU, mtu) + kind
    return Message(_RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body)


def configure_bridge(name: str) -> Message:
    """Have a bridge forward at once (no spanning tree) and flood multicast, as a switch without a querier.

    It learns nothing from frames to 01:80:c2:00:00:0x, which pass no packet filter before the bridge learns from them:
    a pod could say in one that another's MAC is its own.
    """
    data = nested(
        _IFLA_INFO_DATA,
        number32(_IFLA_BR_FORWARD_DELAY, 0),
        number32(_IFLA_BR_STP_STATE, 0),
        attribute(_IFLA_BR_MCAST_SNOOPING, b"\0"),
        attribute(_IFLA_BR_MULTI_BOOLOPT, struct.pack("=II", _BR_NO_LINK_LOCAL_LEARNING, _BR_NO_LINK_LOCAL_LEARNING)),
    )
    kind = nested(_IFLA_LINKINFO, text(_IFLA_INFO_KIND, "bridge"), data)
    return Message(_RTM_NEWLINK, 0, _interface() + text(_IFLA_IFNAME, name) + kind)


def set_up(name: str, mtu: int | None = None) -> Message:
    """Bring a link up, and set its MTU where one is given."""
    body = _interface(up=True) + text(_IFLA_IFNAME, name)
    return Message(_RTM_SETLINK, 0, body + (number32(_IFLA_MTU, mtu) if mtu else b""))


def delete_link(name: str) -> Message:
    """Delete a link and, for a veth, its peer."""
    return Message(_RTM_DELLINK, 0, _interface() + text(_IFLA_IFNAME, name))


def add_pair(name: str, bridge_index: int, mtu: int, *, namespace: int, peer: str, peer_mac: bytes) -> Message:
    """Make a veth pair: ``name`` here, a port of the bridge; ``peer`` in the namespace of that descriptor."""
    peer_info = nested(
        _VETH_INFO_PEER,
        _interface(),
        text(_IFLA_IFNAME, peer),
        number32(_IFLA_MTU, mtu),
        attribute(_IFLA_ADDRESS, peer_mac),
        number32(_IFLA_NET_NS_FD, namespace),
    )
    kind = nested(_IFLA_LINKINFO, text(_IFLA_INFO_KIND, "veth"), nested(_IFLA_INFO_DATA, peer_info))
    head = _interface() + text(_IFLA_IFNAME, name) + number32(_IFLA_MTU, mtu) + number32(_IFLA_MASTER, bridge_index)
    return Message(_RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, head + kind)


def attach_port(name: str, bridge_index: int) -> Message:
    """Make a link that exists a port of the bridge."""
    return Message(_RTM_SETLINK, 0, _interface() + text(_IFLA_IFNAME, name) + number32(_IFLA_MASTER, bridge_index))


def make_hairpin(name: str) -> Message:
    """Let a bridge port send a frame back out where it came from: a pod may reach itself through a host port."""
    slave = nested(
        _IFLA_LINKINFO,
        text(_IFLA_INFO_SLAVE_KIND, "bridge"),
        nested(_IFLA_INFO_SLAVE_DATA, attribute(_IFLA_BRPORT_MODE, b"\1")),
    )
    return Message(_RTM_NEWLINK, 0, _interface() + text(_IFLA_IFNAME, name) + slave)


def keep_without_generated_address(name: str) -> Message:
    """Keep the kernel from generating, and probing for a second, a link-local IPv6 address when the link comes up."""
    mode = attribute(_IFLA_INET6_ADDR_GEN_MODE, bytes([_IN6_ADDR_GEN_MODE_NONE]))
    spec = nested(_IFLA_AF_SPEC, nested(socket.AF_INET6, mode))
    return Message(_RTM_SETLINK, 0, _interface() + text(_IFLA_IFNAME, name) + spec)


def add_address(index: int, interface: IPInterface, *, link_scope: bool = False) -> Message:
    """Give the link an address, or leave it if it has it; IPv6 without duplicate address detection."""
    body = _address(index, interface, _IFA_F_NODAD if interface.version == 6 else 0, link_scope)
    return Message(_RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, body)


def delete_address(index: int, interface: IPInterface) -> Message:
    """Take an address from the link."""
    return Message(_RTM_DELADDR, 0, _address(index, interface, 0, False))


def add_neighbour_route(index: int, neighbour: IPAddress) -> Message:
    """Say that ``neighbour`` is on the link, whatever the link's own prefix."""
    body = _route(neighbour.version, neighbour.max_prefixlen, _SCOPE_LINK) + attribute(_RTA_DST, neighbour.packed)
    return Message(_RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, body + number32(_RTA_OIF, index))


def add_default_route(index: int, gateway: IPAddress) -> Message:
    """Send everything else to ``gateway``."""
    body = _route(gateway.version, 0, _SCOPE_UNIVERSE) + attribute(_RTA_GATEWAY, gateway.packed)
    return Message(_RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, body + number32(_RTA_OIF, index))


def forget_neighbour(index: int, neighbour: IPAddress) -> Message:
    """Have the kernel ask anew which MAC ``neighbour`` has on the link."""
    head = struct.pack("=BxxxiHBB", _family(neighbour.version), index, 0, 0, 0)
    return Message(_RTM_DELNEIGH, 0, head + attribute(_NDA_DST, neighbour.packed))


def set_alias(name: str, alias: str) -> Message:
    """Give a link a text for people and programs that look at it, of at most 255 bytes."""
    return Message(_RTM_SETLINK, 0, _interface() + text(_IFLA_IFNAME, name) + attribute(_IFLA_IFALIAS, alias.encode()))


@dataclass(frozen=True, slots=True)
class Link:
    """What the kernel says of a link. ``kind`` is such as ``bridge``; ``master`` is 0 for a link that is no port."""

    index: int
    name: str
    kind: str
    mac: bytes
    alias: str
    master: int
    up: bool


def find_link(route: NetlinkSocket, name: str) -> Link:
    """The link of that name; raises OSError (ENODEV) if there is none."""
    return route.ask(Message(_RTM_GETLINK, 0, _interface() + text(_IFLA_IFNAME, name)), _link)[0]


def list_links(route: NetlinkSocket) -> list[Link]:
    """All links of the namespace."""
    return route.ask(Message(_RTM_GETLINK, NLM_F_DUMP, _interface()), _link)


def list_ports(route: NetlinkSocket, bridge_index: int) -> list[Link]:
    """The ports of a bridge."""
    question = Message(_RTM_GETLINK, NLM_F_DUMP, _interface() + number32(_IFLA_MASTER, bridge_index))
    # Kernels may answer with all links.
    return [link for link in route.ask(question, _link) if link.master == bridge_index]


def passes_frames(route: NetlinkSocket, name: str) -> bool:
    """Whether the link has a carrier that the kernel acts on already; raises OSError (ENODEV) if there is no link."""
    question = Message(_RTM_GETLINK, 0, _interface() + text(_IFLA_IFNAME, name))
    return route.ask(question, lambda body: attributes(body[16:]).get(_IFLA_OPERSTATE) == bytes([_IF_OPER_UP]))[0]


def list_addresses(route: NetlinkSocket) -> list[tuple[int, IPInterface]]:
    """The IP addresses of all links, each with its link's index."""
    return route.ask(Message(_RTM_GETADDR, NLM_F_DUMP, struct.pack("=BBBBI", socket.AF_UNSPEC, 0, 0, 0, 0)), _owned)


def is_local(route: NetlinkSocket, destination: IPAddress) -> bool:
    """Whether packets to ``destination`` are received here; raises OSError if there is no route."""
    return route.ask(_get_route(destination), lambda body: body[7] == _RTN_LOCAL)[0]


def outgoing_interface(route: NetlinkSocket, destination: IPAddress) -> int:
    """The index of the link by which packets to ``destination`` leave; raises OSError if there is no route."""
    return route.ask(_get_route(destination), lambda body: _number(attributes(body[12:]).get(_RTA_OIF)))[0]


def _get_route(destination: IPAddress) -> Message:
    length = destination.max_prefixlen
    head = struct.pack("=BBBBBBBBI", _family(destination.version), length, 0, 0, 0, 0, 0, 0, 0)
    return Message(_RTM_GETROUTE, 0, head + attribute(_RTA_DST, destination.packed))


def _link(body: bytes) -> Link:
    _, _, index, flags = struct.unpack_from("=BxHiI", body)
    found = attributes(body[16:])
    kind = attributes(found.get(_IFLA_LINKINFO, b"")).get(_IFLA_INFO_KIND)
    return Link(
        index=index,
        name=_text(found.get(_IFLA_IFNAME)),
        kind=_text(kind),
        mac=found.get(_IFLA_ADDRESS, b""),
        alias=_text(found.get(_IFLA_IFALIAS)),
        master=_number(found.get(_IFLA_MASTER)),
        up=bool(flags & _IFF_UP),
    )


def _owned(body: bytes) -> tuple[int, IPInterface] | None:
    family, prefix, _, _, index = struct.unpack_from("=BBBBI", body)
    found = attributes(body[8:])
    address = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS)
    if family not in (socket.AF_INET, socket.AF_INET6) or address is None:
        return None
    return index, ip_interface((address, prefix))


def _text(value: bytes | None) -> str:
    return os.fsdecode((value or b"").rstrip(b"\0"))


def _number(value: bytes | None) -> int:
    return int(struct.unpack("=I", value)[0]) if value is not None and len(value) == 4 else 0


def _interface(*, up: bool = False) -> bytes:
    flags = _IFF_UP if up else 0
    return struct.pack("=BxHiII", socket.AF_UNSPEC, 0, 0, flags, flags)


def _address(index: int, interface: IPInterface, flags: int, link_scope: bool) -> bytes:
    scope = _SCOPE_LINK if link_scope else _SCOPE_UNIVERSE
    head = struct.pack("=BBBBI", _family(interface.version), interface.network.prefixlen, flags, scope, index)
    return head + attribute(_IFA_LOCAL, interface.ip.packed) + attribute(_IFA_ADDRESS, interface.ip.packed)


def _route(version: int, prefix: int, scope: int) -> bytes:
    fields = (_family(version), prefix, 0, 0, _RT_TABLE_MAIN, _RTPROT_STATIC, scope, _RTN_UNICAST, 0)
    return struct.pack("=BBBBBBBBI", *fields)


def _family(version: int) -> int:
    return socket.AF_INET if version == 4 else socket.AF_INET6
