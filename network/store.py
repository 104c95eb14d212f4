"""The network's rows in the store: attachments, addresses, host ports, and the ranges that kubelet announced."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import NamedTuple

import msgspec

from host.database import Database
from host.errors import PodkeelError
from host.files.set_aside import UnreadableRow
from network.attachment import Attachment, check_attachment
from network.ipam import parse_ranges
from network.ports import PROTOCOLS, HostPort

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Attachment).decode

Held = tuple[IPv4Network | IPv6Network, IPv4Address | IPv6Address]
"""An address and its range."""


class AddressRow(NamedTuple):
    """An address a sandbox holds, or held until ``released_at`` (seconds since the epoch)."""

    address: str
    pool: str
    sandbox_id: str
    allocated_at: float
    released_at: float | None


class NetworkStore:
    """The network's rows; each change is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def attachments(self) -> list[Attachment]:
        """All attachments. Rows that cannot be read are set aside, here and below."""
        found: list[Attachment] = []
        unreadable: list[UnreadableRow] = []
        for row in self._database.read("SELECT sandbox_id, attachment FROM network_attachments"):
            try:
                attachment = _decode(row[1])
                if attachment.sandbox_id != row[0]:
                    raise ValueError("it belongs to another sandbox")
                check_attachment(attachment)
                found.append(attachment)
            except (msgspec.MsgspecError, ValueError, TypeError) as error:
                unreadable.append(UnreadableRow("attachment", row[0], str(error), row))
        self._database.set_rows_aside(unreadable, ("network_attachments", "sandbox_id"))
        return found

    def addresses(self) -> list[AddressRow]:
        """All addresses. Those in quarantine are in the order of their release."""
        columns = ", ".join(AddressRow._fields)
        rows = self._database.read(f"SELECT {columns} FROM network_addresses ORDER BY released_at")
        found: list[AddressRow] = []
        unreadable: list[UnreadableRow] = []
        for row in rows:
            try:
                if ip_address(row[0]) not in ip_network(row[1]):
                    raise ValueError(f"it is not in the range {row[1]}")
                _require_sandbox(row[2])
                found.append(AddressRow(row[0], row[1], row[2], float(row[3]), row[4] and float(row[4])))
            except (ValueError, TypeError) as error:
                unreadable.append(UnreadableRow("address", row[0], str(error), row))
        self._database.set_rows_aside(unreadable, ("network_addresses", "address"))
        return found

    def host_ports(self) -> list[tuple[str, HostPort]]:
        """All host ports, each with the sandbox that holds it."""
        rows = self._database.read("SELECT sandbox_id, protocol, host_ip, host_port FROM network_host_ports")
        found: list[tuple[str, HostPort]] = []
        unreadable: list[UnreadableRow] = []
        for row in rows:
            try:
                _require_sandbox(row[0])
                ip_address(row[2])
                if row[1] not in PROTOCOLS or not 0 < row[3] < 65536:
                    raise ValueError(f"{row[1]} {row[3]} is no port")
                found.append((row[0], HostPort(row[1], row[2], row[3])))
            except (ValueError, TypeError) as error:
                unreadable.append(UnreadableRow("host port", row[3], str(error), row))
        self._database.set_rows_aside(unreadable, ("network_host_ports", "host_port"))
        return found

    def pod_cidrs(self) -> list[str]:
        """The ranges that kubelet announced last; empty if there were none."""
        rows = self._database.read("SELECT cidr, position FROM network_pod_cidrs ORDER BY position")
        try:
            if rows:
                parse_ranges([cidr for cidr, _ in rows])
        except (PodkeelError, ValueError, TypeError, AttributeError) as error:
            lost = [UnreadableRow("pod CIDR", row[0], str(error), row) for row in rows]
            self._database.set_rows_aside(lost, ("network_pod_cidrs", "cidr"))
            return []
        return [cidr for cidr, _ in rows]

    async def set_pod_cidrs(self, cidrs: Sequence[str]) -> None:
        """Store the ranges that kubelet announced."""

        def work(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM network_pod_cidrs")
            connection.executemany("INSERT INTO network_pod_cidrs (position, cidr) VALUES (?, ?)", enumerate(cidrs))

        await self._database.write(work)

    async def add(
        self,
        attachment: Attachment,
        addresses: Sequence[Held],
        ports: Sequence[HostPort],
        quarantine: float,
    ) -> None:
        """Record what is about to be created. Delete addresses that were in quarantine longer than ``quarantine`` s."""
        sandbox_id = attachment.sandbox_id
        now = time.time()

        def work(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM network_addresses WHERE released_at <= ?", (now - quarantine,))
            for network, address in addresses:
                # If the clock was set back, the row of an address that memory has freed may still exist.
                connection.execute(
                    "DELETE FROM network_addresses WHERE address = ? AND released_at IS NOT NULL", (str(address),)
                )
                row = AddressRow(str(address), str(network), sandbox_id, now, None)
                connection.execute("INSERT INTO network_addresses VALUES (?, ?, ?, ?, ?)", row)
            connection.executemany(
                "INSERT INTO network_host_ports (protocol, host_ip, host_port, sandbox_id) VALUES (?, ?, ?, ?)",
                [(*port, sandbox_id) for port in ports],
            )
            connection.execute("INSERT INTO network_attachments VALUES (?, ?)", (sandbox_id, _encode(attachment)))

        await self._database.write(work)

    async def add_held(self, held: Sequence[tuple[str, Sequence[Held], Sequence[HostPort]]]) -> None:
        """Record addresses and ports of sandboxes again whose rows were lost."""
        if not held:
            return
        now = time.time()

        def work(connection: sqlite3.Connection) -> None:
            for sandbox_id, addresses, ports in held:
                connection.executemany(
                    "INSERT OR REPLACE INTO network_addresses VALUES (?, ?, ?, ?, NULL)",
                    [(str(address), str(network), sandbox_id, now) for network, address in addresses],
                )
                connection.executemany(
                    "INSERT OR REPLACE INTO network_host_ports (protocol, host_ip, host_port, sandbox_id) "
                    "VALUES (?, ?, ?, ?)",
                    [(*port, sandbox_id) for port in ports],
                )

        await self._database.write(work)

    async def add_attachment(self, attachment: Attachment) -> None:
        """Record an attachment again whose row was lost."""
        row = (attachment.sandbox_id, _encode(attachment))
        await self._database.execute("INSERT OR REPLACE INTO network_attachments VALUES (?, ?)", row)

    async def remove(self, sandbox_id: str, *, quarantine: bool) -> None:
        """Delete an attachment and its host ports, and put its addresses into quarantine.

        Without ``quarantine`` the addresses were never used and are deleted.
        """

        def work(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM network_attachments WHERE sandbox_id = ?", (sandbox_id,))
            connection.execute("DELETE FROM network_host_ports WHERE sandbox_id = ?", (sandbox_id,))
            if quarantine:
                connection.execute(
                    "UPDATE network_addresses SET released_at = ? WHERE sandbox_id = ? AND released_at IS NULL",
                    (time.time(), sandbox_id),
                )
            else:
                connection.execute(
                    "DELETE FROM network_addresses WHERE sandbox_id = ? AND released_at IS NULL", (sandbox_id,)
                )

        await self._database.write(work)

    async def clear(self) -> None:
        """Delete all rows."""

        def work(connection: sqlite3.Connection) -> None:
            for table in ("attachments", "addresses", "host_ports", "pod_cidrs"):
                connection.execute(f"DELETE FROM network_{table}")

        await self._database.write(work)


def _require_sandbox(sandbox_id: object) -> None:
    if not isinstance(sandbox_id, str) or not sandbox_id:
        raise ValueError("its sandbox's id is invalid")
