"""The rtnetlink requests (rtnetlink(7)) for the bridge, a pod's veth pair, its addresses and its routes.

Functions that return a message make a change: many messages are sent at once (``NetlinkSocket.request``). Messages that
are the same for many pods are cached. Functions that take a socket query the kernel and block.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, ip_interface

from network.netlink import (
    IFA_F_NODAD,
    IFF_UP,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    AddressMessage,
    Answer,
    Attribute,
    LinkMessage,
    Message,
    NeighbourMessage,
    Reader,
    RouteMessage,
    message,
    rtnl,
)
from network.netlink_socket import NetlinkSocket

IPAddress = IPv4Address | IPv6Address
IPInterface = IPv4Interface | IPv6Interface

_OPERATIONAL_UP = 6  # RFC 2863, as IF_OPER_UP of linux/if.h
_NO_LINK_LOCAL_LEARNING = 1 << 0
_ADDRESS_GENERATION_OFF = 1
_MAIN_TABLE = 254
_KEPT_MESSAGES = 256

_SCOPES, _TYPES, _PROTOCOLS = rtnl.rt_scope, rtnl.rt_type, rtnl.rt_proto


def add_bridge(name: str, mac: bytes, mtu: int) -> Message:
    """Create a bridge. ``configure_bridge`` sets its options."""
    kind = ("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", "bridge")]})
    return _change_link(name, ("IFLA_ADDRESS", mac), ("IFLA_MTU", mtu), kind, flags=NLM_F_CREATE | NLM_F_EXCL)


def configure_bridge(name: str) -> Message:
    """Make a bridge forward at once (no spanning tree) and flood multicast, as a switch without a querier.

    It does not learn from frames to 01:80:c2:00:00:0x. They pass no packet filter before the bridge learns from them,
    so a pod could claim the MAC of another pod.
    """
    options = {"optval": _NO_LINK_LOCAL_LEARNING, "optmask": _NO_LINK_LOCAL_LEARNING}
    data = [
        ("IFLA_BR_FORWARD_DELAY", 0),
        ("IFLA_BR_STP_STATE", 0),
        ("IFLA_BR_MCAST_SNOOPING", 0),
        ("IFLA_BR_MULTI_BOOLOPT", options),
    ]
    kind = ("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", "bridge"), ("IFLA_INFO_DATA", {"attrs": data})]})
    return _change_link(name, kind)


@lru_cache(_KEPT_MESSAGES)
def set_up(name: str, mtu: int | None = None) -> Message:
    """Bring a link up, and set its MTU if given."""
    found: list[Attribute] = [("IFLA_IFNAME", name)]
    if mtu:
        found.append(("IFLA_MTU", mtu))
    # flags of struct ifinfomsg; ``change`` selects the flags that are set
    return message(LinkMessage, rtnl.RTM_SETLINK, 0, found, {"flags": IFF_UP, "change": IFF_UP})


def delete_link(name: str) -> Message:
    """Delete a link and, for a veth, its peer."""
    return message(LinkMessage, rtnl.RTM_DELLINK, 0, [("IFLA_IFNAME", name)])


def add_pair(name: str, bridge_index: int, mtu: int, *, namespace: int, peer: str, peer_mac: bytes) -> Message:
    """Create a veth pair: ``name`` here, a port of the bridge; ``peer`` in the namespace of that descriptor."""
    other = [
        ("IFLA_IFNAME", peer),
        ("IFLA_MTU", mtu),
        ("IFLA_ADDRESS", peer_mac),
        ("IFLA_NET_NS_FD", namespace),
    ]
    data = {"attrs": [("VETH_INFO_PEER", {"attrs": other})]}
    kind = ("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", "veth"), ("IFLA_INFO_DATA", data)]})
    return _change_link(name, ("IFLA_MTU", mtu), ("IFLA_MASTER", bridge_index), kind, flags=NLM_F_CREATE | NLM_F_EXCL)


def add_ifb(name: str, mtu: int) -> Message:
    """Create a link that forwards the packets redirected to it, and bring it up. An existing link is left as it is."""
    kind = ("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", "ifb")]})
    found: list[Attribute] = [("IFLA_IFNAME", name), ("IFLA_MTU", mtu), kind]
    return message(LinkMessage, rtnl.RTM_NEWLINK, NLM_F_CREATE, found, {"flags": IFF_UP, "change": IFF_UP})


def attach_port(name: str, bridge_index: int) -> Message:
    """Make an existing link a port of the bridge."""
    return _change_link(name, ("IFLA_MASTER", bridge_index))


def configure_port(name: str, *, generate_address: bool = True) -> Message:
    """Allow a bridge port to send a frame back through the port where it arrived: a pod may reach itself through a
    host port.

    ``generate_address`` is as for ``keep_without_generated_address``.
    """
    data = {"attrs": [("IFLA_BRPORT_MODE", 1)]}
    found: list[Attribute] = [
        ("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_SLAVE_KIND", "bridge"), ("IFLA_INFO_SLAVE_DATA", data)]})
    ]
    if not generate_address:
        found.append(_no_generated_address())
    return _change_link(name, *found)


@lru_cache(_KEPT_MESSAGES)
def keep_without_generated_address(name: str) -> Message:
    """Prevent the kernel from generating, and probing for a second, a link-local IPv6 address for the link."""
    return message(LinkMessage, rtnl.RTM_SETLINK, 0, [("IFLA_IFNAME", name), _no_generated_address()])


def set_alias(name: str, alias: str) -> Message:
    """Set a text of at most 255 bytes on a link, for people and programs."""
    return _change_link(name, ("IFLA_IFALIAS", alias))


def add_address(index: int, interface: IPInterface) -> Message:
    """Add an address to the link, unless it has it; for IPv6 without duplicate address detection."""
    fields = _address_fields(index, interface, IFA_F_NODAD if interface.version == 6 else 0)
    attributes = [("IFA_LOCAL", interface.ip.packed)]
    return message(AddressMessage, rtnl.RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, attributes, fields)


def delete_address(index: int, interface: IPInterface) -> Message:
    """Remove an address from the link."""
    # Without IFA_ADDRESS the kernel would remove the first address with any prefix.
    attributes = [("IFA_LOCAL", interface.ip.packed), ("IFA_ADDRESS", interface.ip.packed)]
    return message(AddressMessage, rtnl.RTM_DELADDR, 0, attributes, _address_fields(index, interface))


@lru_cache(_KEPT_MESSAGES)
def add_neighbour_route(index: int, neighbour: IPAddress) -> Message:
    """Declare ``neighbour`` reachable on the link, regardless of the link's prefix."""
    return _add_route(neighbour, neighbour.max_prefixlen, "link", ("RTA_DST", neighbour.packed), ("RTA_OIF", index))


@lru_cache(_KEPT_MESSAGES)
def add_default_route(index: int, gateway: IPAddress) -> Message:
    """Send everything else to ``gateway``."""
    return _add_route(gateway, 0, "universe", ("RTA_GATEWAY", gateway.packed), ("RTA_OIF", index))


def forget_neighbour(index: int, neighbour: IPAddress) -> Message:
    """Make the kernel resolve the MAC of ``neighbour`` on the link again."""
    fields = {"family": _family(neighbour.version), "ifindex": index}
    return message(NeighbourMessage, rtnl.RTM_DELNEIGH, 0, [("NDA_DST", neighbour.packed)], fields)


@dataclass(frozen=True, slots=True)
class Link:
    """The kernel's data about a link. ``kind`` is a type such as ``bridge``; ``master`` is 0 if it is no port."""

    index: int
    name: str
    kind: str
    mac: bytes
    alias: str
    master: int
    up: bool


_read_link = Reader(LinkMessage, "IFLA_IFNAME", "IFLA_LINKINFO", "IFLA_ADDRESS", "IFLA_IFALIAS", "IFLA_MASTER")
_read_state = Reader(LinkMessage, "IFLA_OPERSTATE")
_read_address = Reader(AddressMessage, "IFA_LOCAL", "IFA_ADDRESS")
_read_route = Reader(RouteMessage, "RTA_OIF")


def find_link(route: NetlinkSocket, name: str) -> Link:
    """The link with that name. Raises OSError (ENODEV) if there is none."""
    return route.ask(_get_link(name), _link)[0]


def list_links(route: NetlinkSocket) -> list[Link]:
    """All links of the namespace."""
    return route.ask(message(LinkMessage, rtnl.RTM_GETLINK, NLM_F_DUMP), _link)


def list_ports(route: NetlinkSocket, bridge_index: int) -> list[Link]:
    """The ports of a bridge."""
    question = message(LinkMessage, rtnl.RTM_GETLINK, NLM_F_DUMP, [("IFLA_MASTER", bridge_index)])
    # Kernels may answer with all links.
    return [link for link in route.ask(question, _link) if link.master == bridge_index]


def passes_frames(route: NetlinkSocket, name: str) -> bool:
    """Whether the kernel has processed the link's carrier. Raises OSError (ENODEV) if there is no link."""
    return route.ask(_get_link(name), _is_operational)[0]


def list_addresses(route: NetlinkSocket) -> list[tuple[int, IPInterface]]:
    """The IP addresses of all links, each with its link's index."""
    return route.ask(message(AddressMessage, rtnl.RTM_GETADDR, NLM_F_DUMP), _owned_address)


def is_local(route: NetlinkSocket, destination: IPAddress) -> bool:
    """Whether packets to ``destination`` are received on this node. Raises OSError if there is no route."""
    return route.ask(_get_route(destination), lambda body: bool(_read_route(body)["type"] == _TYPES["local"]))[0]


def outgoing_interface(route: NetlinkSocket, destination: IPAddress) -> int:
    """The index of the link through which packets to ``destination`` leave. Raises OSError if there is no route."""
    return route.ask(_get_route(destination), lambda body: int(_read_route(body).get_attr("RTA_OIF") or 0))[0]


@lru_cache(_KEPT_MESSAGES)
def _get_link(name: str) -> Message:
    return message(LinkMessage, rtnl.RTM_GETLINK, 0, [("IFLA_IFNAME", name)])


def _get_route(destination: IPAddress) -> Message:
    fields = {"family": _family(destination.version), "dst_len": destination.max_prefixlen}
    return message(RouteMessage, rtnl.RTM_GETROUTE, 0, [("RTA_DST", destination.packed)], fields)


def _link(body: bytes) -> Link:
    answer = _read_link(body)
    about = answer.get_attr("IFLA_LINKINFO")
    return Link(
        index=answer["index"],
        name=_text(answer.get_attr("IFLA_IFNAME")),
        kind=_text(about.get_attr("IFLA_INFO_KIND")) if about is not None else "",
        mac=bytes(answer.get_attr("IFLA_ADDRESS") or b""),
        alias=_text(answer.get_attr("IFLA_IFALIAS")),
        master=answer.get_attr("IFLA_MASTER") or 0,
        up=bool(answer["flags"] & IFF_UP),
    )


def _is_operational(body: bytes) -> bool:
    return bool(_read_state(body).get_attr("IFLA_OPERSTATE") == _OPERATIONAL_UP)


def _owned_address(body: bytes) -> tuple[int, IPInterface] | None:
    answer: Answer = _read_address(body)
    if answer["family"] not in (socket.AF_INET, socket.AF_INET6):
        return None
    address = answer.get_attr("IFA_LOCAL") or answer.get_attr("IFA_ADDRESS")
    return (answer["index"], ip_interface((address, answer["prefixlen"]))) if address else None


def _text(value: str | bytes | None) -> str:
    """A name as text. Bytes that are not UTF-8 become surrogates."""
    return os.fsdecode(value or "")


def _change_link(name: str, *found: Attribute, flags: int = 0) -> Message:
    return message(LinkMessage, rtnl.RTM_NEWLINK, flags, [("IFLA_IFNAME", name), *found])


def _no_generated_address() -> Attribute:
    mode = {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", _ADDRESS_GENERATION_OFF)]}
    return ("IFLA_AF_SPEC", {"attrs": [("AF_INET6", mode)]})


def _address_fields(index: int, interface: IPInterface, flags: int = 0) -> dict[str, int]:
    family = _family(interface.version)
    return {"family": family, "prefixlen": interface.network.prefixlen, "flags": flags, "index": index}


def _add_route(towards: IPAddress, prefix: int, scope: str, *found: Attribute) -> Message:
    fields = {
        "family": _family(towards.version),
        "dst_len": prefix,
        "table": _MAIN_TABLE,
        "proto": _PROTOCOLS["static"],
        "scope": _SCOPES[scope],
        "type": _TYPES["unicast"],
    }
    return message(RouteMessage, rtnl.RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, found, fields)


def _family(version: int) -> int:
    return socket.AF_INET if version == 4 else socket.AF_INET6
