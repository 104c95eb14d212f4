"""The elements of a pod in the nftables sets and maps, added or removed in one transaction.

The rules are written once for all pods (``network/nftables/ruleset.py``). A pod has a few elements. They are sent as
nfnetlink messages, which takes a tenth of a millisecond regardless of the size of the node's ruleset.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from ipaddress import ip_address
from itertools import groupby
from typing import NamedTuple

from network.attachment import Attachment, link_local
from network.netlink import NLM_F_CREATE, Message, nfnetlink, nftsocket
from network.netlink_socket import NetlinkSocket
from network.ports import HostPort, host_ports
from network.status import Finding

BRIDGE = "bridge"
INET = "inet"

_FAMILIES = {INET: nftsocket.NFPROTO_INET, BRIDGE: nftsocket.NFPROTO_BRIDGE}
_PROTOCOL_NUMBERS = {"tcp": 6, "udp": 17, "sctp": 132}
_NEW_ELEMENT = nfnetlink.NFNL_SUBSYS_NFTABLES << 8 | nftsocket.NFT_MSG_NEWSETELEM
_DELETE_ELEMENT = nfnetlink.NFNL_SUBSYS_NFTABLES << 8 | nftsocket.NFT_MSG_DELSETELEM
_BATCH_BEGIN = 16
_BATCH_END = 17
_LIST_TABLE = 1
_LIST_SET = 2
_LIST_ELEMENTS = 3
_LIST_ELEMENT = 1
_ELEMENT_KEY = 1
_ELEMENT_DATA = 2
_DATA_VALUE = 1
_ELEMENTS_PER_MESSAGE = 200
_NESTED = 0x8000


class Value(NamedTuple):
    """One part of a key or of data: its text for nft, and its bytes in the kernel."""

    text: str
    packed: bytes


class Element(NamedTuple):
    """An element of a set, or of a map if it has data."""

    family: str
    set_name: str
    key: tuple[Value, ...]
    data: tuple[Value, ...] = ()

    def __str__(self) -> str:
        key = " . ".join(value.text for value in self.key)
        return f"{key} : {' . '.join(value.text for value in self.data)}" if self.data else key


def elements_of(attachment: Attachment) -> list[Element]:
    """All elements of a pod: its identity on the bridge and its host ports."""
    return [*_identity(attachment), *host_port_elements(attachment)]


def _identity(attachment: Attachment) -> list[Element]:
    link = Value(attachment.host_interface, attachment.host_interface.encode().ljust(16, b"\0"))
    mac = Value(attachment.mac, bytes.fromhex(attachment.mac.replace(":", "")))
    found: list[Element] = []
    for source in attachment.addresses:
        if ":" not in source:
            found.append(Element(BRIDGE, "pods4", (link, mac, _address(source))))
            continue
        for address in (source, str(link_local(attachment.mac))):
            value = _address(address)
            found.append(Element(BRIDGE, "pods6", (link, mac, value)))
            # nft has no field for the target of a neighbour advertisement. It writes the raw payload as a number.
            found.append(Element(BRIDGE, "targets6", (link, mac, Value(f"0x{value.packed.hex()}", value.packed))))
    return found


def host_port_elements(attachment: Attachment) -> list[Element]:
    """The destinations of a pod's host ports, and the address pairs of its connections to itself."""
    if not attachment.host_ports:
        return []
    found: list[Element] = []
    versions = [6 if ":" in address else 4 for address in attachment.addresses]
    for mapping in attachment.host_ports:
        for port in host_ports(mapping, versions):
            pod = attachment.address(port.version)
            if pod is not None:
                found.append(_host_port(port, pod, mapping.container_port))
    for address, version in zip(attachment.addresses, versions, strict=True):
        found.append(Element(INET, f"itself{version}", (_address(address), _address(address))))
    return found


def _host_port(port: HostPort, pod: str, container_port: int) -> Element:
    number = _PROTOCOL_NUMBERS[port.protocol]
    protocol = Value(str(number), bytes([number]))
    data = (_address(pod), _port(container_port))
    if port.everywhere:
        return Element(INET, f"any_ports{port.version}", (protocol, _port(port.port)), data)
    return Element(INET, f"ports{port.version}", (protocol, _address(port.host_ip), _port(port.port)), data)


def _address(address: str) -> Value:
    return Value(address, ip_address(address).packed)


def _port(number: int) -> Value:
    return Value(str(number), struct.pack(">H", number))


def add_elements(netfilter: NetlinkSocket, table: str, elements: Sequence[Element]) -> None:
    """Add all elements in one transaction. If the kernel refuses one, raises OSError and adds none."""
    _transaction(netfilter, table, elements, _NEW_ELEMENT)


def remove_elements(netfilter: NetlinkSocket, table: str, elements: Sequence[Element]) -> None:
    """Remove all elements. A missing element or table is no error."""
    if not elements:
        return
    try:
        _transaction(netfilter, table, elements, _DELETE_ELEMENT)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        for element in elements:
            try:
                _transaction(netfilter, table, [element], _DELETE_ELEMENT)
            except OSError as single:
                if single.errno != errno.ENOENT:
                    raise


def compare_sets(
    wanted: set[tuple[str, str]], allowed: set[tuple[str, str]], present: set[tuple[str, str]]
) -> list[Finding]:
    """Missing elements, as (set, text), and elements that are neither wanted nor allowed."""
    kind = "nftables element"
    missing = [Finding(kind, f"{name}: {key}", "missing") for name, key in sorted(wanted - present)]
    return missing + [
        Finding(kind, f"{name}: {key}", "belongs to no sandbox") for name, key in sorted(present - wanted - allowed)
    ]


def _transaction(netfilter: NetlinkSocket, table: str, elements: Sequence[Element], kind: int) -> None:
    batch = struct.pack(">BBH", 0, 0, nfnetlink.NFNL_SUBSYS_NFTABLES)
    messages = [Message(_BATCH_BEGIN, 0, batch)]
    for (family, set_name), group in groupby(elements, key=lambda element: (element.family, element.set_name)):
        waiting = list(group)
        while waiting:
            part, waiting = waiting[:_ELEMENTS_PER_MESSAGE], waiting[_ELEMENTS_PER_MESSAGE:]
            body = (
                struct.pack(">BBH", _FAMILIES[family], 0, 0)
                + _text(_LIST_TABLE, table)
                + _text(_LIST_SET, set_name)
                + _nested(_LIST_ELEMENTS, *(_encode(element, kind == _NEW_ELEMENT) for element in part))
            )
            messages.append(Message(kind, NLM_F_CREATE if kind == _NEW_ELEMENT else 0, body))
    messages.append(Message(_BATCH_END, 0, batch))
    for refusal in netfilter.exchange(messages, last=len(messages) - 2):
        raise refusal.error()


def _encode(element: Element, with_data: bool) -> bytes:
    key = _nested(_ELEMENT_KEY, _attribute(_DATA_VALUE, _concatenated(element.key)))
    if not (with_data and element.data):
        return _nested(_LIST_ELEMENT, key)
    return _nested(_LIST_ELEMENT, key, _nested(_ELEMENT_DATA, _attribute(_DATA_VALUE, _concatenated(element.data))))


def _concatenated(values: Sequence[Value]) -> bytes:
    return b"".join(value.packed + bytes(-len(value.packed) % 4) for value in values)


# pyroute2 has no classes for keys of several parts, and needs fifty times as long for an element.
def _attribute(kind: int, payload: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    return struct.pack("=HH", len(payload) + 4, kind) + payload + bytes(-len(payload) % 4)


def _nested(kind: int, *attributes: bytes) -> bytes:
    """An attribute that has other attributes in it."""
    return _attribute(kind | _NESTED, b"".join(attributes))


def _text(kind: int, value: str) -> bytes:
    """A zero-terminated string attribute."""
    return _attribute(kind, value.encode() + b"\0")
