"""Loads what sandboxes hold from the store, at a start of the built-in network."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from ipaddress import ip_address

from host.errors import AlreadyExistsError
from network import ports
from network.attachment import Attachment
from network.bridge.reservation import Reservation
from network.ipam import IPAddress, Ipam, IPNetwork
from network.ports import HostPort, PortRegistry
from network.store import NetworkStore

_log = logging.getLogger("podkeel.network")

LostHolds = dict[str, Reservation]
"""Addresses and host ports of attachments whose rows are lost, by sandbox."""


def load(store: NetworkStore, book: Ipam, registry: PortRegistry) -> tuple[dict[str, Reservation], LostHolds]:
    """Put all held addresses and ports into ``book`` and ``registry``, and return the attachments with theirs. Blocks.

    An attachment has addresses and ports also if their rows are lost: no other sandbox may get them. The caller writes
    these rows again.
    """
    held: dict[str, list[tuple[IPNetwork, IPAddress]]] = {}
    for row in store.addresses():
        network, address = book.restore(row.pool, row.address, row.allocated_at, row.released_at)
        if row.released_at is None:
            held.setdefault(row.sandbox_id, []).append((network, address))
    taken: dict[str, list[HostPort]] = {}
    for sandbox_id, port in store.host_ports():
        if _take(registry, sandbox_id, port):
            taken.setdefault(sandbox_id, []).append(port)
    reservations: dict[str, Reservation] = {}
    lost: LostHolds = {}
    owners: dict[str, str] = {}
    for attachment in store.attachments():
        key = attachment.sandbox_id
        reservation = Reservation(attachment, held.get(key, []), taken.get(key, []))
        addresses = list(_lost_addresses(book, reservation, owners))
        lost_ports = [port for port in _ports_of(attachment) if port not in reservation.ports]
        lost_ports = [port for port in lost_ports if _take(registry, key, port)]
        if addresses or lost_ports:
            lost[key] = Reservation(attachment, addresses, lost_ports)
            _log.warning("sandbox %s: rows of addresses or host ports lost from the store: restored", key[:13])
        reservations[key] = Reservation(
            attachment, [*reservation.addresses, *addresses], [*reservation.ports, *lost_ports]
        )
    return reservations, lost


def _lost_addresses(
    book: Ipam, reservation: Reservation, owners: dict[str, str]
) -> Iterator[tuple[IPNetwork, IPAddress]]:
    """The addresses of an attachment without a row, held from now on. ``owners`` are the sandboxes of addresses."""
    attachment = reservation.attachment
    present = {str(address) for _, address in reservation.addresses}
    for text in attachment.addresses:
        owner = owners.setdefault(text, attachment.sandbox_id)
        if owner != attachment.sandbox_id:
            _log.error("sandbox %s: address %s is held by sandbox %s", attachment.sandbox_id[:13], text, owner[:13])
        elif text not in present and (network := book.range_of(ip_address(text), attachment.gateways)) is not None:
            yield book.restore(str(network), text, 0.0, None)


def _ports_of(attachment: Attachment) -> list[HostPort]:
    versions = attachment.versions
    return [port for mapping in attachment.host_ports for port in ports.host_ports(mapping, versions)]


def _take(registry: PortRegistry, sandbox_id: str, port: HostPort) -> bool:
    try:
        registry.take(sandbox_id, [port])
    except AlreadyExistsError as error:  # from a wrong row: it must not prevent the start
        _log.error("sandbox %s: host ports: %s", sandbox_id[:13], error)
        return False
    return True
