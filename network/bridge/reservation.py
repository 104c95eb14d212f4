"""What the built-in network holds for one sandbox."""

from __future__ import annotations

from typing import NamedTuple

from network.attachment import Attachment
from network.ipam import IPAddress, IPNetwork
from network.ports import HostPort


class Reservation(NamedTuple):
    """An attachment with the range of each of its addresses and its host ports."""

    attachment: Attachment
    addresses: list[tuple[IPNetwork, IPAddress]]
    ports: list[HostPort]
