"""Host ports: checks the mappings of a pod, and records which pod holds each port of the node."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable, Sequence
from ipaddress import ip_address
from typing import NamedTuple

from host.errors import AlreadyExistsError, InvalidArgumentError, UnsupportedError
from network.attachment import PortMapping

PROTOCOLS = ("tcp", "udp", "sctp")
WILDCARDS = {4: "0.0.0.0", 6: "::"}
_SOCKETS = {
    "tcp": (socket.SOCK_STREAM, socket.IPPROTO_TCP),
    "udp": (socket.SOCK_DGRAM, socket.IPPROTO_UDP),
    "sctp": (socket.SOCK_STREAM, 132),
}

_WAITING = {"tcp": b"0A", "udp": b"07"}  # states in /proc/net: listening; not connected


class HostPort(NamedTuple):
    """One port of the node in one family, on one address or on all addresses."""

    protocol: str
    host_ip: str
    port: int

    @property
    def version(self) -> int:
        """The IP version."""
        return 6 if ":" in self.host_ip else 4

    @property
    def everywhere(self) -> bool:
        """Whether it occupies the port on every address of the family."""
        return self.host_ip == WILDCARDS[self.version]

    def __str__(self) -> str:
        host = f"[{self.host_ip}]" if self.version == 6 else self.host_ip
        return f"{host}:{self.port}/{self.protocol}"


def normalise(mappings: Iterable[PortMapping], versions: Sequence[int]) -> tuple[PortMapping, ...]:
    """Check the mappings that ask for a host port. Raises InvalidArgumentError or UnsupportedError."""
    wanted: list[PortMapping] = []
    for mapping in mappings:
        if mapping.host_port == 0:
            continue
        if mapping.protocol not in PROTOCOLS:
            raise InvalidArgumentError(f"host port {mapping.host_port}: protocol {mapping.protocol!r} is unknown")
        for name, port in (("host port", mapping.host_port), ("container port", mapping.container_port)):
            if not 1 <= port <= 65535:
                raise InvalidArgumentError(f"{name} {port} is not between 1 and 65535")
        wanted.append(_with_plain_address(mapping, versions))
    return tuple(wanted)


def _with_plain_address(mapping: PortMapping, versions: Sequence[int]) -> PortMapping:
    if not mapping.host_ip:
        return mapping
    try:
        address = ip_address(mapping.host_ip.strip("[]"))
    except ValueError as error:
        raise InvalidArgumentError(f"host port {mapping.host_port}: host address: {error}") from error
    if address.version == 6 and address.is_loopback:
        raise UnsupportedError(f"host port {mapping.host_port} on ::1: Linux routes no loopback IPv6 traffic to pods")
    if address.version not in versions:
        raise InvalidArgumentError(
            f"host port {mapping.host_port} on {address}: pods of this node have no IPv{address.version} address"
        )
    return PortMapping(mapping.protocol, mapping.container_port, mapping.host_port, str(address))


def host_ports(mapping: PortMapping, versions: Iterable[int]) -> list[HostPort]:
    """The ports of the node that a mapping occupies, one for each family."""
    addresses = [mapping.host_ip] if mapping.host_ip else [WILDCARDS[version] for version in versions]
    return [HostPort(mapping.protocol, address, mapping.host_port) for address in addresses]


class PortRegistry:
    """The holders of host ports. A port on one address and the same port on all addresses exclude each other."""

    def __init__(self) -> None:
        self._holders: dict[tuple[str, int, int], dict[str, str]] = {}

    def take(self, sandbox_id: str, ports: Sequence[HostPort]) -> None:
        """Take all ports or none. Raises AlreadyExistsError with the port and its holder."""
        taken: list[HostPort] = []
        try:
            for port in ports:
                self._take_one(sandbox_id, port)
                taken.append(port)
        except AlreadyExistsError:
            self.release(taken)
            raise

    def release(self, ports: Iterable[HostPort]) -> None:
        """Free ports. A port that is free already is no error."""
        for port in ports:
            key = (port.protocol, port.version, port.port)
            holders = self._holders.get(key, {})
            holders.pop(port.host_ip, None)
            if not holders:
                self._holders.pop(key, None)

    def _take_one(self, sandbox_id: str, port: HostPort) -> None:
        holders = self._holders.setdefault((port.protocol, port.version, port.port), {})
        for host_ip, holder in holders.items():
            if port.everywhere or host_ip in (port.host_ip, WILDCARDS[port.version]):
                who = "the same pod" if holder == sandbox_id else f"sandbox {holder}"
                raise AlreadyExistsError(f"host port {port} is taken by {who} (on {host_ip}): choose another port")
        holders[port.host_ip] = sandbox_id


def check_free_on_node(ports: Iterable[HostPort]) -> None:
    """Raise AlreadyExistsError for a port that a process of the node serves: the pod would take its connections."""
    for port in ports:
        kind, protocol = _SOCKETS[port.protocol]
        family = socket.AF_INET6 if port.version == 6 else socket.AF_INET
        try:
            with socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol) as probe:
                if port.protocol != "udp":  # closing connections do not serve
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if port.version == 6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((port.host_ip, port.port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE and _has_server(port):
                raise AlreadyExistsError(
                    f"host port {port} is in use by a process of the node: stop it, choose another port, or a hostIP "
                    "that it does not serve"
                ) from error
            # Addresses the node does not have yet and protocols without sockets here can still be forwarded.


def _has_server(port: HostPort) -> bool:
    """Whether a socket waits for clients on the port. Connections that the node opened from it do not count."""
    waiting = _WAITING.get(port.protocol)
    if waiting is None:
        return True
    wanted = b":%04X" % port.port
    for name in (port.protocol, f"{port.protocol}6"):  # an IPv6 socket may serve IPv4 too
        try:
            # Read line by line: a node may have very many sockets.
            with open(f"/proc/thread-self/net/{name}", "rb") as table:
                sockets = (line.split(None, 4) for line in table)
                if any(fields[1].endswith(wanted) and fields[3] == waiting for fields in sockets):
                    return True
        except FileNotFoundError:  # a node without IPv6
            continue
    return False
