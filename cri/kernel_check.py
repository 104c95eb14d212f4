"""Tests the kernel features that pods need. Functions that change namespaces need a new thread."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

from host import libc
from host.files import mounts
from network import rtnetlink
from network.netlink import NETLINK_ROUTE
from network.netlink_socket import NetlinkSocket

RULESET = b"""
table inet podkeel_check {
  set ranges4 { type ipv4_addr; flags interval; elements = { 192.0.2.0/24 } }
  map ports4 { type inet_proto . inet_service : ipv4_addr . inet_service; elements = { tcp . 80 : 192.0.2.1 . 80 } }
  chain from_outside {
    type nat hook prerouting priority -100; policy accept;
    meta nfproto ipv4 dnat ip to meta l4proto . th dport map @ports4
  }
  chain leaving {
    type nat hook postrouting priority 100; policy accept;
    meta nfproto ipv4 ip saddr @ranges4 masquerade
  }
}
table bridge podkeel_check {
  chain from_pods { type filter hook prerouting priority -300; policy accept; }
}
"""


def overlay_error(folder: Path) -> str:
    """Why no overlay can be mounted with its folders below ``folder``; empty if it can. Leaves nothing behind."""
    try:
        mounts.enter_new_mount_namespace()
        with tempfile.TemporaryDirectory(prefix=".podkeel-check-", dir=folder) as scratch:
            for name in ("lower", "upper", "work", "merged"):
                Path(scratch, name).mkdir()
            layers = f"lowerdir={scratch}/lower,upperdir={scratch}/upper,workdir={scratch}/work"
            libc.mount("overlay", f"{scratch}/merged", "overlay", 0, layers)
            try:
                Path(scratch, "merged", "file").touch()
            finally:
                mounts.unmount(f"{scratch}/merged")
    except OSError as error:
        return f"cannot be mounted with folders in {folder}: {error.strerror}"
    return ""


def links_error() -> str:
    """Why no bridge with a veth pair can be made, tried in a new network namespace; empty if it can."""
    try:
        libc.unshare(libc.CLONE_NEWNET)
        with NetlinkSocket(NETLINK_ROUTE) as route, open("/proc/thread-self/ns/net", "rb") as here:
            route.request([rtnetlink.add_bridge("check0", bytes.fromhex("020000000001"), 1500)])
            index = socket.if_nametoindex("check0")
            pair = rtnetlink.add_pair(
                "check1", index, 1500, namespace=here.fileno(), peer="check2", peer_mac=bytes.fromhex("020000000002")
            )
            route.request([pair])
    except OSError as error:
        return f"cannot be made: {error.strerror}"
    return ""


def _reads(path: str, *expected: str) -> Callable[[], bool]:
    def present() -> bool:
        try:
            content = Path(path).read_text().strip()
        except OSError:
            return False
        return content in expected if expected else content != "0"

    return present


# Name, whether it is present, its purpose, what does not work without it, the remedy.
FEATURES: tuple[tuple[str, Callable[[], bool], str, str, str], ...] = (
    (
        "user namespaces",
        _reads("/proc/sys/user/max_user_namespaces"),
        "pods with hostUsers: false",
        "off: pods with user namespaces are refused",
        "sysctl user.max_user_namespaces=65536",
    ),
    (
        "seccomp",
        Path("/proc/sys/kernel/seccomp/actions_avail").exists,
        "filters of system calls",
        "not in this kernel: profiles cannot be applied",
        "a kernel with CONFIG_SECCOMP_FILTER",
    ),
    (
        "apparmor",
        _reads("/sys/module/apparmor/parameters/enabled", "Y"),
        "profiles of pods",
        "not enabled: pods that ask for a profile are refused",
        "boot with lsm=…,apparmor if your pods need it",
    ),
    (
        "pressure (PSI)",
        Path("/proc/pressure/cpu").exists,
        "pressure in statistics",
        "off: statistics have no pressure values",
        "boot with psi=1",
    ),
)
