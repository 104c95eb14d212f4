"""Addresses and host ports that sandboxes hold in the store although the row of their attachment is lost."""

from __future__ import annotations

from collections.abc import Collection
from ipaddress import ip_address, ip_network
from typing import NamedTuple

from network.ipam import IPAddress, IPNetwork
from network.ports import HostPort
from network.store import NetworkStore


class LostRows(NamedTuple):
    """The held addresses and ports, by sandbox."""

    addresses: dict[str, list[tuple[IPNetwork, IPAddress]]]
    ports: dict[str, list[HostPort]]

    @property
    def sandboxes(self) -> list[str]:
        """All sandboxes that hold an address or a port."""
        return list(dict.fromkeys((*self.addresses, *self.ports)))


def lost_rows(store: NetworkStore, known: Collection[str]) -> LostRows:
    """The addresses and ports of sandboxes whose attachment is not ``known``. Blocks."""
    lost = LostRows({}, {})
    for row in store.addresses():
        if row.released_at is None and row.sandbox_id not in known:
            held = (ip_network(row.pool), ip_address(row.address))
            lost.addresses.setdefault(row.sandbox_id, []).append(held)
    for sandbox_id, port in store.host_ports():
        if sandbox_id not in known:
            lost.ports.setdefault(sandbox_id, []).append(port)
    return lost
