"""A pod's connection to the network: its interface, its addresses and its host ports."""

from __future__ import annotations

import hashlib
import re
from ipaddress import IPv4Address, IPv6Address, ip_address

import msgspec

INTERFACE_PREFIX_LENGTH = 6
POD_INTERFACE = "eth0"

_LINK = re.compile(r"pk[0-9a-f]{13}")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_MAX_MTU = 65535


class PortMapping(msgspec.Struct, frozen=True):
    """A port of the node that leads to a port of the pod.

    ``protocol`` is ``tcp``, ``udp`` or ``sctp``. An empty ``host_ip`` means every address of the node in every family
    the pod has; ``0.0.0.0`` and ``::`` mean every address of their family. ``host_port`` 0 means no host port.
    """

    protocol: str
    container_port: int
    host_port: int
    host_ip: str = ""


class Bandwidth(msgspec.Struct, frozen=True):
    """The rates in bits per second at which a pod may receive (``ingress``) and send (``egress``); 0 means no limit."""

    ingress: int = 0
    egress: int = 0


class PodDns(msgspec.Struct, frozen=True):
    """The resolver configuration of a pod, for CNI plugins that answer DNS queries."""

    servers: tuple[str, ...] = ()
    searches: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


class AttachRequest(msgspec.Struct, frozen=True):
    """The configuration of a sandbox's network.

    Its network namespace is pinned at ``netns_path``. CNI plugins get the pod's ``name``, ``namespace`` and ``uid``.
    """

    sandbox_id: str
    netns_path: str
    port_mappings: tuple[PortMapping, ...] = ()
    bandwidth: Bandwidth = Bandwidth()
    name: str = ""
    namespace: str = ""
    uid: str = ""
    dns: PodDns = PodDns()


class Attachment(msgspec.Struct, frozen=True):
    """A sandbox's connection to the network. Addresses and gateways have no prefix; the primary family comes first.

    If the rate at which the pod sends is limited, ``limiter`` is the link that limits it. ``netns_path`` is where its
    namespace is pinned; it is empty in rows of older versions. For pods of a CNI network ``host_interface`` and ``mac``
    may be empty and ``mtu`` 0, if the plugins did not report them.
    """

    sandbox_id: str
    host_interface: str
    addresses: tuple[str, ...]
    gateways: tuple[str, ...]
    mac: str
    mtu: int
    host_ports: tuple[PortMapping, ...] = ()
    interface: str = POD_INTERFACE
    bandwidth: Bandwidth = Bandwidth()
    limiter: str = ""
    netns_path: str = ""

    @property
    def links(self) -> tuple[str, ...]:
        """The links of the node that only this pod uses."""
        return (self.host_interface, self.limiter) if self.limiter else (self.host_interface,)

    @property
    def versions(self) -> tuple[int, ...]:
        """The IP versions of the pod's addresses."""
        return tuple(dict.fromkeys(ip_address(text).version for text in self.addresses))

    def address(self, version: int) -> str | None:
        """The pod's address of that IP version."""
        return next((text for text in self.addresses if ip_address(text).version == version), None)


def check_attachment(attachment: Attachment) -> None:
    """Raise ValueError for an impossible attachment to the built-in network: links with these names are deleted."""
    for text in (*attachment.addresses, *attachment.gateways):
        ip_address(text)
    if not attachment.addresses:
        raise ValueError("it has no address")
    for name in attachment.links:
        if not _LINK.fullmatch(name):
            raise ValueError(f"its link {name!r} does not have the form of a pod's link")
    if not _MAC.fullmatch(attachment.mac):
        raise ValueError(f"its MAC {attachment.mac!r} is invalid")
    if attachment.interface != POD_INTERFACE:
        raise ValueError(f"its interface {attachment.interface!r} is not {POD_INTERFACE}")
    if not 0 <= attachment.mtu <= _MAX_MTU:
        raise ValueError(f"its MTU {attachment.mtu} is invalid")


def interface_prefix(bridge: str) -> str:
    """The prefix of the names of all host-side links of a bridge."""
    return "pk" + hashlib.sha256(bridge.encode()).hexdigest()[: INTERFACE_PREFIX_LENGTH - 2]


def interface_name(bridge: str, sandbox_id: str) -> str:
    """The name of a sandbox's host-side link. It is always the same, so that it can be found after a crash."""
    return interface_prefix(bridge) + hashlib.sha256(f"{bridge}/{sandbox_id}".encode()).hexdigest()[:9]


def limiter_name(bridge: str, sandbox_id: str) -> str:
    """The name of the link that limits what a sandbox sends. It is always the same, as for ``interface_name``."""
    return interface_prefix(bridge) + hashlib.sha256(f"{bridge}/{sandbox_id}/egress".encode()).hexdigest()[:9]


def pod_mac(primary: IPv4Address | IPv6Address) -> str:
    """A locally administered MAC that is as unique on the bridge as the pod's primary address."""
    if isinstance(primary, IPv4Address):
        return (b"\x0a\x58" + primary.packed).hex(":")
    return (b"\x0a\x5a" + hashlib.sha256(primary.packed).digest()[:4]).hex(":")


def bridge_mac(bridge: str) -> bytes:
    """A locally administered MAC for the bridge. It does not change when ports are added or removed."""
    return b"\x0a\x5c" + hashlib.sha256(bridge.encode()).digest()[:4]


def link_local(mac: str) -> IPv6Address:
    """The link-local address of an interface with that MAC (RFC 4291, modified EUI-64)."""
    raw = bytes.fromhex(mac.replace(":", ""))
    return IPv6Address(b"\xfe\x80" + bytes(6) + bytes([raw[0] ^ 2]) + raw[1:3] + b"\xff\xfe" + raw[3:])
