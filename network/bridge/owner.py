"""The owner of a bridge: the agent that its alias (``ip -d link``) names, so that two agents never use one bridge."""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from ipaddress import IPv4Interface, IPv6Interface
from pathlib import Path
from typing import NamedTuple

from host.errors import WrongStateError
from network import rtnetlink
from network.netlink_socket import NetlinkSocket

IPInterface = IPv4Interface | IPv6Interface

_ALIAS_BYTES = 255
_FIRST_WORD = "podkeel-agent"
# An agent that has just created a bridge sets the alias at once.
_NAMING_SECONDS = 0.1


class BridgeOwner(NamedTuple):
    """An agent: its id, and its data folder, which is empty if the alias has no room for it."""

    agent_id: str
    data_dir: str

    @property
    def alias(self) -> str:
        """The alias of a bridge of this agent."""
        alias = f"{_FIRST_WORD} {self.agent_id} {self.data_dir}"
        return alias if len(alias.encode()) <= _ALIAS_BYTES else f"{_FIRST_WORD} {self.agent_id} "

    @property
    def place(self) -> str:
        """The owner in messages, so that operators find it."""
        return f"of another agent (id {self.agent_id}, data folder {self.data_dir or 'unknown'})"

    def is_there(self) -> bool:
        """Whether its data folder still belongs to it. If the folder cannot be read, the answer is yes."""
        if not self.data_dir:
            return True
        try:
            return (Path(self.data_dir) / "agent-id").read_text(encoding="ascii").strip() == self.agent_id
        except (FileNotFoundError, NotADirectoryError):
            return False
        except (OSError, UnicodeDecodeError):
            return True


def claim(route: NetlinkSocket, name: str, owner: BridgeOwner, addresses: Sequence[IPInterface], *, made: bool) -> None:
    """Record ``owner`` as the owner of the existing bridge ``name``. ``made``: this agent has just created it. Blocks.

    Raises WrongStateError if another agent owns the bridge, or a bridge with addresses of the same ranges. A bridge
    whose agent is gone, and to which no pod is connected, is taken over.
    """
    others = {bridge: found for bridge, found in _owners(route).items() if found.agent_id != owner.agent_id}
    if not made and name not in others and not rtnetlink.find_link(route, name).alias:
        time.sleep(_NAMING_SECONDS)
        others.update((key, found) for key, found in _owners(route).items() if found.agent_id != owner.agent_id)
    if name in others:
        _refuse_unless_left(route, name, owner, others.pop(name))
    for bridge, other in others.items():
        _refuse_overlap(route, bridge, other, addresses)
    route.request([rtnetlink.set_alias(name, owner.alias)])


def _owners(route: NetlinkSocket) -> dict[str, BridgeOwner]:
    found: dict[str, BridgeOwner] = {}
    for link in rtnetlink.list_links(route):
        words = link.alias.split(" ", 2)
        if len(words) == 3 and words[0] == _FIRST_WORD:
            found[link.name] = BridgeOwner(words[1], words[2])
    return found


def _refuse_unless_left(route: NetlinkSocket, name: str, owner: BridgeOwner, other: BridgeOwner) -> None:
    if other.data_dir and other.data_dir == owner.data_dir:
        return  # the same agent, which lost its id
    ports = rtnetlink.list_ports(route, rtnetlink.find_link(route, name).index)
    if other.is_there() or ports:
        raise WrongStateError(
            f"bridge {name} is {other.place}, {len(ports)} pods are connected to it: configure another "
            f"network.bridge and other network.pod_cidrs for this agent, or run `podkeel reset` for the other one; "
            f"if the other agent is gone for good, run `ip link delete {name}`"
        )


def _refuse_overlap(route: NetlinkSocket, bridge: str, other: BridgeOwner, addresses: Sequence[IPInterface]) -> None:
    try:
        index = rtnetlink.find_link(route, bridge).index
    except OSError as error:
        if error.errno == errno.ENODEV:
            return
        raise
    for owner, theirs in rtnetlink.list_addresses(route):
        for ours in addresses:
            if owner == index and ours.version == theirs.version and _overlap(ours, theirs):
                raise WrongStateError(
                    f"range {ours.network} of network.pod_cidrs overlaps {theirs.network} on bridge {bridge}, which is "
                    f"{other.place}: configure other network.pod_cidrs for this agent, or run `podkeel reset` for the "
                    f"other one; if the other agent is gone for good, run `ip link delete {bridge}`"
                )


def _overlap(ours: IPInterface, theirs: IPInterface) -> bool:
    return ours.ip in theirs.network or theirs.ip in ours.network
