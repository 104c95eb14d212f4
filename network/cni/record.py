"""The store's row of a pod on a CNI network.

It has everything that DEL needs after a crash, even if the configuration was changed or deleted.
"""

from __future__ import annotations

import enum
import sqlite3
from typing import Any

import msgspec

from host.database import Database
from host.files.set_aside import UnreadableRow
from network.attachment import Attachment, PortMapping
from network.cni.configuration import Configuration
from network.cni.result import pod_interface
from network.ports import HostPort, host_ports

FAMILIES = (4, 6)


class CniState(enum.StrEnum):
    """The state of a pod's network: ADD may have begun; ADD has succeeded; DEL is requested and must succeed."""

    ADDING = "adding"
    ADDED = "added"
    DELETING = "deleting"


class CniRecord(msgspec.Struct, frozen=True):
    """A sandbox on a CNI network.

    ``arguments`` is CNI_ARGS. ``capabilities`` are the values for ``runtimeConfig``. ``result`` is the last plugin's
    result. ``host_ports`` are held by the pod. ``forwards``: the node itself forwards them, because no plugin does.
    """

    sandbox_id: str
    netns_path: str
    arguments: str
    configuration: Configuration
    capabilities: dict[str, Any]
    state: CniState = CniState.ADDING
    host_ports: tuple[PortMapping, ...] = ()
    forwards: bool = False
    networks: tuple[str, ...] = ()
    result: dict[str, Any] | None = None
    attachment: Attachment | None = None

    @property
    def taken(self) -> list[HostPort]:
        """The ports of the node that its host ports occupy."""
        return [port for mapping in self.host_ports for port in host_ports(mapping, FAMILIES)]

    def connected(self, result: dict[str, Any]) -> CniRecord:
        """The record after ADD with this result. Raises PodkeelError if the result has no address for the pod."""
        interface = pod_interface(self.configuration.name, result)
        attachment = Attachment(
            sandbox_id=self.sandbox_id,
            host_interface=interface.host_interface,
            addresses=interface.addresses,
            gateways=interface.gateways,
            mac=interface.mac,
            mtu=interface.mtu,
            host_ports=self.host_ports,
        )
        return msgspec.structs.replace(
            self, state=CniState.ADDED, result=result, networks=interface.networks, attachment=attachment
        )


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(CniRecord).decode


class CniStore:
    """The rows of pods on CNI networks."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def records(self) -> list[CniRecord]:
        """All records. Rows that cannot be read are set aside."""
        found: list[CniRecord] = []
        unreadable: list[UnreadableRow] = []
        for row in self._database.read("SELECT sandbox_id, record FROM network_cni_attachments"):
            try:
                record = _decode(row[1])
                if record.sandbox_id != row[0]:
                    raise ValueError("it belongs to another sandbox")
                found.append(record)
            except (msgspec.MsgspecError, ValueError, TypeError) as error:
                unreadable.append(UnreadableRow("CNI attachment", row[0], str(error), row))
        self._database.set_rows_aside(unreadable, ("network_cni_attachments", "sandbox_id"))
        return found

    async def save(self, record: CniRecord) -> None:
        """Write a record, new or changed."""
        await self._database.execute(
            "INSERT OR REPLACE INTO network_cni_attachments VALUES (?, ?)", (record.sandbox_id, _encode(record))
        )

    async def remove(self, sandbox_id: str) -> None:
        """Delete a record."""

        def work(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM network_cni_attachments WHERE sandbox_id = ?", (sandbox_id,))

        await self._database.write(work)
