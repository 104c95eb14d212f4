"""The part of an nftables table that forwards host ports, for the bridge's pods and for pods of CNI networks.

A packet to a host port gets the pod's address from ``ports`` (one address of the node) or ``any_ports`` (all of them).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# 127.0.0.0/8 belongs to the node alone: no packet from elsewhere may be forwarded by it. IPv6 has no route_localnet.
# So the node's packets to ::1 stay on the node and are refused instead of lost.
RULES = """
  map ports4 {{ type inet_proto . ipv4_addr . inet_service : ipv4_addr . inet_service; {ports4} }}
  map ports6 {{ type inet_proto . ipv6_addr . inet_service : ipv6_addr . inet_service; {ports6} }}
  map any_ports4 {{ type inet_proto . inet_service : ipv4_addr . inet_service; {any_ports4} }}
  map any_ports6 {{ type inet_proto . inet_service : ipv6_addr . inet_service; {any_ports6} }}
  set itself4 {{ type ipv4_addr . ipv4_addr; {itself4} }}
  set itself6 {{ type ipv6_addr . ipv6_addr; {itself6} }}
  set ranges4 {{ type ipv4_addr; flags interval; auto-merge; {ranges4} }}
  set ranges6 {{ type ipv6_addr; flags interval; auto-merge; {ranges6} }}
  chain host_ports {{
    dnat ip to meta l4proto . ip daddr . th dport map @ports4
    dnat ip to meta l4proto . th dport map @any_ports4
    dnat ip6 to meta l4proto . ip6 daddr . th dport map @ports6
    dnat ip6 to meta l4proto . th dport map @any_ports6
  }}
  chain from_network {{
    type nat hook prerouting priority dstnat; policy accept;
    iifname != "lo" ip daddr 127.0.0.0/8 accept
    meta l4proto {{ tcp, udp, sctp }} fib daddr type local jump host_ports
  }}
  chain from_node {{
    type nat hook output priority -100; policy accept;
    ip6 daddr ::1 accept
    meta l4proto {{ tcp, udp, sctp }} fib daddr type local jump host_ports
  }}
"""

SETS = tuple(f"{name}{version}" for name in ("ports", "any_ports", "itself", "ranges") for version in (4, 6))


def declarations(names: Iterable[str], held: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """The text that fills each set of ``names`` in a template with the elements in ``held``."""
    texts = {name: ", ".join(dict.fromkeys(held.get(name, ()))) for name in names}
    return {name: f"elements = {{ {text} }};" if text else "" for name, text in texts.items()}
