"""The nftables tables of a bridge: one for its ports and one for routed traffic. Both are loaded in one transaction.

A packet from a pod enters at the bridge. There ``pods4`` and ``pods6`` have the MAC and addresses that its port may
use. A packet to a host port gets the pod's address (``network/nftables/host_port_rules.py``). A packet that leaves the
pod ranges gets the node's address. No rule names a pod.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network, IPv6Network, collapse_addresses

import msgspec

from host import processes
from network.attachment import interface_prefix
from network.nftables import host_port_rules
from network.nftables.elements import BRIDGE, INET, Element

IPNetwork = IPv4Network | IPv6Network

_COMMAND_SECONDS = 20

# Not multicast or broadcast. Link-local is masqueraded: clouds serve names and credentials at 169.254.169.254.
_NEVER_MASQUERADED = ("224.0.0.0/4", "255.255.255.255/32", "ff00::/8")

_BRIDGE_TABLE = """
table bridge {table} {{
  set pods4 {{ type ifname . ether_addr . ipv4_addr; {pods4} }}
  set pods6 {{ type ifname . ether_addr . ipv6_addr; {pods6} }}
  set targets6 {{ typeof iifname . ether saddr . @th,64,128; {targets6} }}
  chain from_pods {{
    type filter hook prerouting priority -300; policy accept;
    iifname != "{prefix}*" accept
    ether type ip iifname . ether saddr . ip saddr @pods4 accept
    ether type arp iifname . ether saddr . arp saddr ip @pods4 iifname . arp saddr ether . arp saddr ip @pods4 accept
    icmpv6 type {{ nd-router-advert, nd-redirect }} drop
    icmpv6 type nd-neighbor-advert iifname . ether saddr . @th,64,128 != @targets6 drop
    ether type ip6 iifname . ether saddr . ip6 saddr @pods6 accept
    drop
  }}
}}
"""

# The filter on 127.0.0.0/8 comes before address translation, because with route_localnet the bridge would pass such
# packets. Frames to 01:80:c2:00:00:0x arrive on a pod's link itself, past the bridge and its filter: all of them are
# dropped. The node sends redirects when a packet leaves on the bridge where it arrived: they are dropped too.
_INET_TABLE = (
    """
table inet {table} {{
  set unmasked4 {{ type ipv4_addr; flags interval; auto-merge; {unmasked4} }}
  set unmasked6 {{ type ipv6_addr; flags interval; auto-merge; {unmasked6} }}
  chain guard {{
    type filter hook prerouting priority -300; policy accept;
    iifname "{prefix}*" drop
    iifname "{bridge}" ip daddr 127.0.0.0/8 drop
  }}
"""
    + host_port_rules.RULES
    + """
  chain redirects {{
    type filter hook output priority filter; policy accept;
    oifname "{bridge}" icmp type redirect drop
    oifname "{bridge}" icmpv6 type nd-redirect drop
  }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    iifname "{bridge}" accept
    oifname "{bridge}" accept
  }}
  chain leaving {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname "{bridge}" ip saddr 127.0.0.0/8 masquerade
    oifname "{bridge}" ct status dnat ip saddr . ip daddr @itself4 masquerade
    oifname "{bridge}" ct status dnat ip6 saddr . ip6 daddr @itself6 masquerade
    {masquerade}
  }}
}}
"""
)

_SETS = ("pods4", "pods6", "targets6", "unmasked4", "unmasked6", *host_port_rules.SETS)

_MASQUERADE = """oifname != { "lo", "%s" } ip saddr @ranges4 ip daddr != @unmasked4 masquerade
    oifname != { "lo", "%s" } ip6 saddr @ranges6 ip6 daddr != @unmasked6 masquerade"""


def remove_script(table: str) -> str:
    """The commands that remove both tables. A missing table is no error."""
    return "".join(f"table {family} {table}\ndelete table {family} {table}\n" for family in (INET, BRIDGE))


def table_script(
    bridge: str,
    ranges: Sequence[IPNetwork],
    cluster_ranges: Sequence[IPNetwork],
    *,
    masquerade: bool,
    elements: Iterable[Element],
) -> str:
    """The commands that replace both tables with new ones that have ``elements``."""
    held: dict[str, list[str]] = {}
    for element in elements:
        held.setdefault(element.set_name, []).append(str(element))
    unmasked = [*ranges, *cluster_ranges, *(_network(text) for text in _NEVER_MASQUERADED)]
    for version in (4, 6):
        held[f"ranges{version}"] = _collapsed(ranges, version)
        held[f"unmasked{version}"] = _collapsed(unmasked, version)
    tables = (_BRIDGE_TABLE + _INET_TABLE).format(
        table=bridge,
        bridge=bridge,
        prefix=interface_prefix(bridge),
        masquerade=_MASQUERADE % (bridge, bridge) if masquerade else "",
        **host_port_rules.declarations(_SETS, held),
    )
    return remove_script(bridge) + tables


def _collapsed(networks: Iterable[IPNetwork], version: int) -> list[str]:
    if version == 4:
        return [str(n) for n in collapse_addresses(n for n in networks if isinstance(n, IPv4Network))]
    return [str(n) for n in collapse_addresses(n for n in networks if isinstance(n, IPv6Network))]


def _network(text: str) -> IPNetwork:
    return IPv6Network(text) if ":" in text else IPv4Network(text)


async def load(script: str) -> None:
    """Run nft commands as one transaction. Raises CommandError with the output of nft."""
    await processes.run(["nft", "-f", "-"], stdin=script.encode(), timeout=_COMMAND_SECONDS)


async def listing(table: str, families: Sequence[str] = (BRIDGE, INET)) -> list[bytes] | None:
    """The tables of that name in nft's JSON; None if one is missing."""
    outputs: list[bytes] = []
    for family in families:
        command = ["nft", "-j", "-n", "list", "table", family, table]
        completed = await processes.run(command, timeout=_COMMAND_SECONDS, check=False)
        if completed.status != 0:
            return None
        outputs.append(completed.stdout)
    return outputs


def listed_elements(outputs: Iterable[bytes]) -> set[tuple[str, str]]:
    """The content of the pods' sets, as (set, text of the element in nft)."""
    found: set[tuple[str, str]] = set()
    for output in outputs:
        for entry in msgspec.json.decode(output)["nftables"]:
            holder = entry.get("set") or entry.get("map")
            if holder and not holder["name"].startswith(("ranges", "unmasked")):
                found.update((holder["name"], _listed(element)) for element in holder.get("elem", ()))
    return found


def _listed(element: object) -> str:
    if isinstance(element, list):
        return " : ".join(_listed(part) for part in element)
    if isinstance(element, dict):
        return " . ".join(str(part) for part in element["concat"])
    return str(element)
