"""What a pod has of the network: its interface, its addresses and the host ports that lead to it."""

from __future__ import annotations

import hashlib
from ipaddress import IPv4Address, IPv6Address, ip_address

import msgspec

INTERFACE_PREFIX_LENGTH = 6


class PortMapping(msgspec.Struct, frozen=True):
    """A port of the node that leads to a port of the pod.

    ``protocol`` is ``tcp``, ``udp`` or ``sctp``. An empty ``host_ip`` stands for every address of the node in every
    family the pod has; ``0.0.0.0`` and ``::`` for every address of their family. ``host_port`` 0 means no host port.
    """

    protocol: str
    container_port: int
    host_port: int
    host_ip: str = ""


class Attachment(msgspec.Struct, frozen=True):
    """A sandbox's connection to the network; addresses and gateways have no prefix, the primary family comes first."""

    sandbox_id: str
    host_interface: str
    addresses: tuple[str, ...]
    gateways: tuple[str, ...]
    mac: str
    mtu: int
    host_ports: tuple[PortMapping, ...] = ()
    interface: str = "eth0"

    def address(self, version: int) -> str | None:
        """The pod's address of that IP version."""
        return next((text for text in self.addresses if ip_address(text).version == version), None)


def interface_prefix(bridge: str) -> str:
    """What the names of all host-side links of a bridge begin with."""
    return "pk" + hashlib.sha256(bridge.encode()).hexdigest()[: INTERFACE_PREFIX_LENGTH - 2]


def interface_name(bridge: str, sandbox_id: str) -> str:
    """The name of a sandbox's host-side link: always the same, so that it can be found after a crash."""
    return interface_prefix(bridge) + hashlib.sha256(f"{bridge}/{sandbox_id}".encode()).hexdigest()[:9]


def pod_mac(primary: IPv4Address | IPv6Address) -> str:
    """A locally administered MAC that is as unique on the bridge as the pod's primary address."""
    if isinstance(primary, IPv4Address):
        return (b"\x0a\x58" + primary.packed).hex(":")
    return (b"\x0a\x5a" + hashlib.sha256(primary.packed).digest()[:4]).hex(":")


def bridge_mac(bridge: str) -> bytes:
    """A locally administered MAC for the bridge that never changes, whatever ports come and go."""
    return b"\x0a\x5c" + hashlib.sha256(bridge.encode()).digest()[:4]


def link_local(mac: str) -> IPv6Address:
    """The link-local address of an interface with that MAC (RFC 4291, modified EUI-64)."""
    raw = bytes.fromhex(mac.replace(":", ""))
    return IPv6Address(b"\xfe\x80" + bytes(6) + bytes([raw[0] ^ 2]) + raw[1:3] + b"\xff\xfe" + raw[3:])
