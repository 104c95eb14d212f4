"""What the store knows of the network: attachments, addresses, host ports, and the ranges the kubelet announced."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import NamedTuple

import msgspec

from host.database import Database
from network.attachment import Attachment
from network.ports import HostPort

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Attachment).decode


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
        """All attachments."""
        return [_decode(blob) for (blob,) in self._database.read("SELECT attachment FROM network_attachments")]

    def addresses(self) -> list[AddressRow]:
        """All addresses, those that rest in the order in which they were released."""
        columns = ", ".join(AddressRow._fields)
        rows = self._database.read(f"SELECT {columns} FROM network_addresses ORDER BY released_at")
        return [AddressRow(*row) for row in rows]

    def host_ports(self) -> list[tuple[str, HostPort]]:
        """All host ports with the sandbox that holds each."""
        rows = self._database.read("SELECT sandbox_id, protocol, host_ip, host_port FROM network_host_ports")
        return [(sandbox_id, HostPort(*port)) for sandbox_id, *port in rows]

    def pod_cidrs(self) -> list[str]:
        """The ranges the kubelet announced last; empty if it never did."""
        return [cidr for (cidr,) in self._database.read("SELECT cidr FROM network_pod_cidrs ORDER BY position")]

    async def set_pod_cidrs(self, cidrs: Sequence[str]) -> None:
        """Remember the ranges the kubelet announced."""

        def work(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM network_pod_cidrs")
            connection.executemany("INSERT INTO network_pod_cidrs (position, cidr) VALUES (?, ?)", enumerate(cidrs))

        await self._database.write(work)

    async def add(
        self,
        attachment: Attachment,
        addresses: Sequence[tuple[IPv4Network | IPv6Network, IPv4Address | IPv6Address]],
        ports: Sequence[HostPort],
        quarantine: float,
    ) -> None:
        """Record what is about to be made, and forget addresses that rested longer than ``quarantine`` seconds."""
        sandbox_id = attachment.sandbox_id
        now = time.time()

        def work(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM network_addresses WHERE released_at <= ?", (now - quarantine,))
            for network, address in addresses:
                # A clock that was set back can leave a row that memory already considers rested.
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

    async def remove(self, sandbox_id: str, *, rest: bool) -> None:
        """Forget an attachment and its host ports; its addresses ``rest``, or are forgotten if they were never used."""

        def work(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM network_attachments WHERE sandbox_id = ?", (sandbox_id,))
            connection.execute("DELETE FROM network_host_ports WHERE sandbox_id = ?", (sandbox_id,))
            if rest:
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
        """Forget everything."""

        def work(connection: sqlite3.Connection) -> None:
            for table in ("attachments", "addresses", "host_ports", "pod_cidrs"):
                connection.execute(f"DELETE FROM network_{table}")

        await self._database.write(work)
