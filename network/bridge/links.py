"""The bridge and the veth pairs of pods in the kernel. All functions block: call them from a thread."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, ip_address, ip_interface
from typing import NoReturn

from host import libc
from host.errors import NotFoundError, PodkeelError, UnavailableError, WrongStateError
from network import bandwidth, conntrack, rtnetlink, sysctl
from network.attachment import Attachment, bridge_mac, interface_prefix, link_local
from network.bridge.owner import BridgeOwner, claim
from network.netlink import NETLINK_NETFILTER, NETLINK_ROUTE, Message
from network.netlink_socket import NetlinkSocket
from network.nftables.elements import add_elements, elements_of, remove_elements

IPAddress = IPv4Address | IPv6Address
IPInterface = IPv4Interface | IPv6Interface

_READY_SECONDS = 1.5
_READY_POLL_SECONDS = 0.0005


class TableMissingError(Exception):
    """The nftables tables or their sets are missing, because another program flushed the ruleset."""


class BridgeLinks:
    """The bridge ``name`` in the network namespace of the thread that makes this object; ``owner`` is its agent."""

    def __init__(self, name: str, owner: BridgeOwner | None = None) -> None:
        self.name = name
        self._owner = owner
        self._ipv6 = sysctl.ipv6_available()
        self._own_namespace = open("/proc/thread-self/ns/net", "rb")  # noqa: SIM115 - closed with the sockets
        self._route = NetlinkSocket(NETLINK_ROUTE)
        try:
            self._netfilter = NetlinkSocket(NETLINK_NETFILTER)
            self._netfilter.allow_large_batches()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the netlink sockets. The bridge and the links of pods stay."""
        self._own_namespace.close()
        self._route.close()
        if hasattr(self, "_netfilter"):
            self._netfilter.close()

    def index(self) -> int | None:
        """The bridge's interface index; None if it does not exist."""
        return _index(self.name)

    def is_up(self) -> bool:
        """Whether the bridge is up. It must exist."""
        return rtnetlink.find_link(self._route, self.name).up

    def ensure(self, addresses: Sequence[IPInterface], mtu: int) -> None:
        """Create the bridge, or set these addresses and this MTU on the existing one. Enable forwarding on the node.

        Raises WrongStateError if a link of that name exists that this program did not create, or if another agent owns
        it or a bridge with overlapping addresses.
        """
        try:
            refusals = self._route.exchange([rtnetlink.add_bridge(self.name, bridge_mac(self.name), mtu)])
            for refusal in refusals:
                if refusal.number != errno.EEXIST:
                    raise refusal.error()
            link = rtnetlink.find_link(self._route, self.name)
            if (link.kind, link.mac) != ("bridge", bridge_mac(self.name)):
                raise WrongStateError(
                    f"link {self.name} exists and was not made by Podkeel: remove it or choose another network.bridge"
                )
            if self._owner is not None:
                claim(self._route, self.name, self._owner, addresses, made=not refusals)
            # The kernel would probe a generated link-local address for a second. The node cannot resolve IPv6
            # neighbours during that time.
            quiet = [rtnetlink.keep_without_generated_address(self.name)] if self._ipv6 else []
            self._route.request([rtnetlink.configure_bridge(self.name), *quiet, rtnetlink.set_up(self.name, mtu)])
            index = socket.if_nametoindex(self.name)
            present = set(self.addresses())
            # Delete first: IPv6 refuses an address that exists with another prefix.
            changes = [rtnetlink.delete_address(index, address) for address in present.difference(addresses)]
            changes += [rtnetlink.add_address(index, address) for address in addresses]
            if any(address.version == 6 for address in addresses):
                sysctl.enable_ipv6(self.name)
                own = link_local(bridge_mac(self.name).hex(":"))
                changes.append(rtnetlink.add_address(index, ip_interface(f"{own}/64")))
            self._route.request(changes, tolerate=(errno.EEXIST, errno.EADDRNOTAVAIL))
            _await_addresses(self._route, (address.ip for address in addresses))
            sysctl.forward_ipv4(self.name)
            if any(address.version == 6 for address in addresses):
                sysctl.forward_ipv6()
        except OSError as error:
            raise PodkeelError(f"bridge {self.name} could not be set up: {error.strerror or error}") from error

    def addresses(self) -> list[IPInterface]:
        """The bridge's addresses, without link-local ones."""
        index = self.index()
        found = rtnetlink.list_addresses(self._route)
        return [address for owner, address in found if owner == index and not address.is_link_local]

    def ports(self) -> set[str]:
        """The names of all links with this bridge's prefix: the host-side links of pods, and their limiters."""
        prefix = interface_prefix(self.name)
        return {name for _, name in socket.if_nameindex() if name.startswith(prefix)}

    def attached(self) -> set[str]:
        """The names of the bridge's ports that are up; empty if there is no bridge."""
        index = self.index()
        if index is None:
            return set()
        return {port.name for port in rtnetlink.list_ports(self._route, index) if port.up}

    def attach_again(self, names: Iterable[str]) -> list[str]:
        """Attach those of these links to the bridge again that are detached or down. Return their names.

        When a bridge is deleted, its ports are detached but not deleted.
        """
        index = self.index()
        if index is None:
            return []
        lost = sorted(self.ports().intersection(names) - self.attached())
        for name in lost:
            changes = [rtnetlink.attach_port(name, index), rtnetlink.configure_port(name), rtnetlink.set_up(name)]
            # If a pod's namespace has ended, its link is still listed until the kernel has deleted it.
            self._route.request(changes, tolerate=(errno.ENODEV,))
        return lost

    def connect(self, attachment: Attachment, namespace_path: str) -> None:
        """Create the pod's interface in its namespace, and add its elements. The calling thread moves to the namespace.

        If the nftables tables are missing, raises TableMissingError before it creates anything.
        """
        what = f"sandbox {attachment.sandbox_id} could not be connected to {self.name}"
        elements = elements_of(attachment)
        try:
            pin = open(namespace_path, "rb")  # noqa: SIM115 - the errors of opening and of using it differ
        except OSError as error:
            raise NotFoundError(f"{what}: its network namespace is missing: {error}") from error
        with pin:
            if os.path.sameopenfile(pin.fileno(), self._own_namespace.fileno()):
                raise NotFoundError(f"{what}: {namespace_path} is the node's own network namespace")
            bridge_index = self.index()
            if bridge_index is None:
                raise UnavailableError(f"{what}: the bridge is missing: `podkeel check --repair` creates it again")
            try:
                add_elements(self._netfilter, self.name, elements)
            except OSError as error:
                if error.errno == errno.ENOENT:
                    raise TableMissingError from error
                _fail(f"{what}: nftables refused its elements", error)
            try:
                # Otherwise the kernel may send to the MAC of an earlier pod with this address for up to a minute.
                former = [rtnetlink.forget_neighbour(bridge_index, ip_address(text)) for text in attachment.addresses]
                self._route.request(former, tolerate=(errno.ENOENT,))
                self._make_pair(attachment, bridge_index, pin.fileno())
                libc.setns(pin.fileno(), libc.CLONE_NEWNET)
                if 6 in attachment.versions:
                    sysctl.enable_ipv6(attachment.interface)
                with NetlinkSocket(NETLINK_ROUTE) as inside:
                    inside.request(self._configuration(attachment))
                    _await_carrier(inside, attachment.interface)
                    _await_addresses(inside, map(ip_address, attachment.addresses))
                for name in (attachment.host_interface, self.name):  # the first port gives the bridge its carrier
                    _await_carrier(self._route, name)
            except OSError as error:
                _fail(what, error)
        conntrack.forget_udp(self._netfilter, attachment.host_ports, attachment.versions)

    def disconnect(self, attachment: Attachment, *, delete_link: bool) -> None:
        """Remove the pod's elements, and with ``delete_link`` also its interface.

        Deleting a link waits for grace periods of the kernel (about 20 ms). If its namespace ends, the kernel deletes
        the link itself, but not the limiter.
        """
        try:
            remove_elements(self._netfilter, self.name, elements_of(attachment))
            doomed = [attachment.host_interface] if delete_link else []
            self.delete_links([*doomed, attachment.limiter] if attachment.limiter else doomed)
        except OSError as error:
            _fail(f"sandbox {attachment.sandbox_id} could not be disconnected from {self.name}", error)
        conntrack.forget_udp(self._netfilter, attachment.host_ports, attachment.versions)

    def delete_links(self, names: Sequence[str]) -> None:
        """Delete links. A missing link is no error."""
        for name in names:
            self._route.request([rtnetlink.delete_link(name)], tolerate=(errno.ENODEV,))

    def _make_pair(self, attachment: Attachment, bridge_index: int, namespace: int) -> None:
        name = attachment.host_interface
        mac = bytes.fromhex(attachment.mac.replace(":", ""))
        messages = [
            rtnetlink.add_pair(
                name, bridge_index, attachment.mtu, namespace=namespace, peer=attachment.interface, peer_mac=mac
            ),
            rtnetlink.configure_port(name, generate_address=not self._ipv6),
            rtnetlink.set_up(name),
        ]
        refusals = self._route.exchange(messages)
        if refusals and (refusals[0].position, refusals[0].number) == (0, errno.EEXIST) and _index(name) is not None:
            # A killed attempt left this link: only this sandbox uses the name.
            self.delete_links([name])
            refusals = self._route.exchange(messages)
        for refusal in refusals:
            raise refusal.error()
        bandwidth.limit(self._route, attachment)

    def _configuration(self, attachment: Attachment) -> list[Message]:
        index = socket.if_nametoindex(attachment.interface)
        addresses = [ip_address(text) for text in attachment.addresses]
        generated = ip_interface(f"{link_local(attachment.mac)}/64")
        return [
            rtnetlink.set_up("lo"),
            *([rtnetlink.keep_without_generated_address(attachment.interface)] if self._ipv6 else []),
            rtnetlink.set_up(attachment.interface),
            *([rtnetlink.add_address(index, generated)] if any(a.version == 6 for a in addresses) else []),
            *(rtnetlink.add_address(index, ip_interface(address)) for address in addresses),
            *(rtnetlink.add_neighbour_route(index, ip_address(gateway)) for gateway in attachment.gateways),
            *(rtnetlink.add_default_route(index, ip_address(gateway)) for gateway in attachment.gateways),
        ]


def _await_carrier(route: NetlinkSocket, name: str) -> None:
    """Wait until the kernel has processed the link's carrier. Until then packets are lost and the port is blocked.

    The kernel does this in the background, which can take a second on a busy node. Since version 6.8 a query for the
    link makes it do so at once. A link that stays down is no error: its peer may come up later.
    """
    _poll(lambda: rtnetlink.passes_frames(route, name))


def _await_addresses(route: NetlinkSocket, addresses: Iterable[IPAddress]) -> None:
    """Wait until IPv6 addresses receive packets, because the kernel completes adding them in the background."""
    waited = [address for address in addresses if address.version == 6]
    _poll(lambda: all(rtnetlink.is_local(route, address) for address in waited))


def _poll(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while not happened() and time.monotonic() < deadline:
        time.sleep(_READY_POLL_SECONDS)


def _index(name: str) -> int | None:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return None


def _fail(what: str, error: OSError) -> NoReturn:
    raise PodkeelError(f"{what}: {error.strerror or error}") from error
