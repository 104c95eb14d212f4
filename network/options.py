"""The options of networks: the ``[network]`` table of the configuration file."""

from __future__ import annotations

from typing import Literal

import msgspec


class NetworkOptions(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Which network pods are connected to, and how.

    ``mode``: ``cni`` for CNI plugins, ``built-in`` for the bridge made here, ``auto`` for CNI plugins where
    ``cni_config_dir`` holds a configuration and the bridge elsewhere.
    ``cni_config_dir``: the folder of CNI configurations, of which the first by name is used; watched for changes.
    ``cni_bin_dirs``: the folders in which plugins are looked for, in this order.
    ``cni_timeout_seconds``: how long one call of one plugin may take before it is killed.

    The built-in network:

    ``bridge``: the name of the bridge, and of the nftables tables; two agents on a node need different ones.
    ``pod_cidrs``: the ranges pod addresses come from, IPv4, IPv6 or both, the primary family first; further ranges of a
    family are used when the ones before are full. Ranges that kubelet announces replace them. ``cluster_cidrs``: the
    ranges of all nodes' pods; traffic to them keeps the pod's address, as does traffic to this node's own ranges.
    ``masquerade``: all other traffic from pods leaves with the node's address. ``mtu``: of the bridge and of pods; 0
    takes that of the default route's interface, else 1500. ``quarantine_seconds``: how long the address of a removed
    pod stays in quarantine before it may be assigned again.
    """

    mode: Literal["auto", "cni", "built-in"] = "auto"
    cni_config_dir: str = "/etc/cni/net.d"
    cni_bin_dirs: tuple[str, ...] = ("/opt/cni/bin", "/usr/lib/cni")
    cni_timeout_seconds: float = 60.0
    bridge: str = "podkeel0"
    pod_cidrs: tuple[str, ...] = ("10.88.0.0/16",)
    cluster_cidrs: tuple[str, ...] = ()
    masquerade: bool = True
    mtu: int = 0
    quarantine_seconds: float = 30.0
