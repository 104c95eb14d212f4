"""Host ports of pods on CNI networks whose plugins forward none: a separate nftables table, replaced as a whole.

The table translates addresses and opens nothing: the CNI network decides whether a packet passes.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address

from host.concurrency import threads
from host.concurrency.tasks import cancel_and_wait
from host.errors import PodkeelError
from network import conntrack, rtnetlink, sysctl
from network.attachment import Attachment, PortMapping
from network.cni.record import CniRecord, CniState
from network.netlink import NETLINK_NETFILTER, NETLINK_ROUTE
from network.netlink_socket import NetlinkSocket
from network.nftables import host_port_rules, ruleset
from network.nftables.elements import compare_sets, host_port_elements
from network.status import Finding

_log = logging.getLogger("podkeel.network")

_LOOK_AGAIN_SECONDS = 60.0

# Pods of one network may reach each other without routing by this node: answers would not come back through it.
_TABLE = (
    """
table inet {table} {{
  chain guard {{
    type filter hook prerouting priority -300; policy accept;
    iifname != "lo" ip daddr 127.0.0.0/8 drop
  }}
"""
    + host_port_rules.RULES
    + """
  chain leaving {{
    type nat hook postrouting priority srcnat; policy accept;
    ct status dnat ip saddr 127.0.0.0/8 ip daddr . ip daddr @itself4 masquerade
    ct status dnat ip saddr @ranges4 ip daddr . ip daddr @itself4 masquerade
    ct status dnat ip6 saddr @ranges6 ip6 daddr . ip6 daddr @itself6 masquerade
  }}
}}
"""
)


class HostPortTable:
    """The table ``name``.

    It stays from the first pod that needs it on, because of its guard: see ``open_localhost``.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._changing = asyncio.Lock()
        self._needed = False
        self._checked_at = 0.0
        self._looking: asyncio.Task[None] | None = None

    async def load(self, records: Iterable[CniRecord]) -> None:
        """Load the host ports of the records that need the table. Raises CommandError with the output of nft."""
        async with self._changing:
            forwarding = _forwarding(records)
            self._needed = self._needed or bool(forwarding) or await self._listing() is not None
            if self._needed:
                await ruleset.load(self._removal + self._script(forwarding))
                await threads.in_network_thread(open_localhost, [attachment for _, attachment in forwarding])

    async def remove(self) -> None:
        """Remove the table, if it exists."""
        async with self._changing:
            self._needed = False
            await ruleset.load(self._removal)

    def check_soon(self, records: Iterable[CniRecord]) -> None:
        """Check in the background, at most once a minute, that the table exists. Load it again if it is missing."""
        idle = self._looking is None or self._looking.done()
        if self._needed and idle and time.monotonic() > self._checked_at + _LOOK_AGAIN_SECONDS:
            self._checked_at = time.monotonic()
            self._looking = asyncio.create_task(self._look(records))

    async def settled(self) -> None:
        """Wait for a check that runs in the background."""
        if self._looking is not None:
            await asyncio.wait([self._looking])

    async def close(self) -> None:
        """End the check in the background."""
        await cancel_and_wait(self._looking)

    async def findings(self, records: Iterable[CniRecord]) -> list[Finding]:
        """The differences between the table and the records."""
        async with self._changing:
            wanted = {(e.set_name, str(e)) for _, pod in _forwarding(records) for e in host_port_elements(pod)}
            listing = await self._listing()
        if listing is None:
            return [Finding("nftables table", self.name, "missing")] if wanted else []
        return compare_sets(wanted, set(), ruleset.listed_elements(listing))

    async def _look(self, records: Iterable[CniRecord]) -> None:
        try:
            if await self._listing() is None:
                _log.warning("nftables table %s: deleted by another program: creating it again", self.name)
                await self.load(records)
        except (PodkeelError, OSError) as error:
            _log.warning("nftables table %s: cannot be checked: %s", self.name, error)

    async def _listing(self) -> list[bytes] | None:
        return await ruleset.listing(self.name, families=("inet",))

    @property
    def _removal(self) -> str:
        return f"table inet {self.name}\ndelete table inet {self.name}\n"

    def _script(self, forwarding: Sequence[tuple[CniRecord, Attachment]]) -> str:
        held: dict[str, list[str]] = {}
        for record, attachment in forwarding:
            for network in record.networks:
                held.setdefault("ranges6" if ":" in network else "ranges4", []).append(network)
            for element in host_port_elements(attachment):
                held.setdefault(element.set_name, []).append(str(element))
        return _TABLE.format(table=self.name, **host_port_rules.declarations(host_port_rules.SETS, held))


def _forwarding(records: Iterable[CniRecord]) -> list[tuple[CniRecord, Attachment]]:
    """The connected pods whose host ports this table forwards."""
    connected = (record for record in records if record.forwards and record.state is CniState.ADDED)
    return [(record, record.attachment) for record in connected if record.attachment is not None]


async def forget_flows(mappings: Sequence[PortMapping]) -> None:
    """Delete the conntrack entries of these UDP ports, so that the kernel routes their packets by the new rules."""

    def work() -> None:
        with NetlinkSocket(NETLINK_NETFILTER) as netfilter:
            conntrack.forget_udp(netfilter, mappings)

    if any(mapping.protocol == "udp" for mapping in mappings):
        await threads.in_network_thread(work)


def open_localhost(attachments: Sequence[Attachment]) -> None:
    """Enable the node to reach the pods from 127.0.0.1.

    The links may also carry other pods or the network around the node, which could then reach the node's 127.0.0.1. The
    table's guard prevents that. The setting is never reverted, because other pods may need it. If the node has no route
    to a pod, this is logged, and the ports of other pods still work.
    """
    with NetlinkSocket(NETLINK_ROUTE) as route:
        for attachment in attachments:
            address = attachment.address(4)
            if address is None:
                continue
            try:
                index = rtnetlink.outgoing_interface(route, IPv4Address(address))
                sysctl.send_from_localhost(socket.if_indextoname(index))
            except OSError as error:
                _log.warning(
                    "sandbox %s: host ports do not work on 127.0.0.1: the node cannot reach %s: %s",
                    attachment.sandbox_id[:13],
                    address,
                    error.strerror,
                )
