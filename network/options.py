"""What can be configured about networks: the ``[network]`` table of the configuration file."""

from __future__ import annotations

import msgspec


class NetworkOptions(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The built-in network.

    ``bridge``: the name of the bridge, and of the nftables tables; two agents on a node need different ones.
    ``pod_cidrs``: the ranges pod addresses come from, IPv4, IPv6 or both, the primary family first; further ranges of
    a family are used when the ones before are full. Ranges the kubelet announces take their place.
    ``cluster_cidrs``: the ranges of all nodes' pods; traffic to them keeps the pod's address, as does traffic to this
    node's own ranges. ``masquerade``: all other traffic from pods leaves with the node's address.
    ``mtu``: of the bridge and of pods; 0 takes that of the default route's interface, else 1500.
    ``quarantine_seconds``: how long the address of a removed pod rests before it may be given out again.
    """

    bridge: str = "podkeel0"
    pod_cidrs: tuple[str, ...] = ("10.88.0.0/16",)
    cluster_cidrs: tuple[str, ...] = ()
    masquerade: bool = True
    mtu: int = 0
    quarantine_seconds: float = 30.0
