"""Kernel settings under /proc/sys/net for a node with pods."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from host.files.procfs import table_lines

_NET = Path("/proc/sys/net")
_METRIC = re.compile(rb"[0-9a-f]{8}")


def ipv6_available() -> bool:
    """Whether the kernel has IPv6 and it is enabled."""
    return (_NET / "ipv6/conf").is_dir()


def forward_ipv4(bridge: str) -> None:
    """Enable IPv4 forwarding, and allow the node to send from 127.0.0.1 to pods on this bridge only."""
    _write("ipv4/ip_forward", "1")
    send_from_localhost(bridge)


def send_from_localhost(interface: str) -> None:
    """Allow the node to send from 127.0.0.1 through this interface."""
    _write(f"ipv4/conf/{interface}/route_localnet", "1")


def forward_ipv6() -> None:
    """Enable IPv6 forwarding without losing the routes that routers announced to the node."""
    if _read("ipv6/conf/all/forwarding") == "1":
        return
    for interface in (_NET / "ipv6/conf").iterdir():
        # With forwarding, the kernel ignores router advertisements unless accept_ra is 2.
        if interface.name not in ("all", "lo") and _read(f"ipv6/conf/{interface.name}/accept_ra") == "1":
            _write(f"ipv6/conf/{interface.name}/accept_ra", "2")
    _write("ipv6/conf/all/forwarding", "1")


def enable_ipv6(interface: str) -> None:
    """Enable IPv6 on an interface of the calling thread's namespace, regardless of the default there."""
    _write(f"ipv6/conf/{interface}/disable_ipv6", "0")


def uplink() -> str:
    """The interface of the IPv4 default route, else of the IPv6 one; empty if there is none."""
    return _ipv4_uplink() or _ipv6_uplink() or ""


def uplink_mtu() -> int:
    """The MTU of the uplink; 1500 if there is none."""
    interface = uplink()
    try:
        return int(Path(f"/sys/class/net/{interface}/mtu").read_text()) if interface else 1500
    except (OSError, ValueError):
        return 1500


def _ipv4_uplink() -> str | None:
    try:
        return ipv4_default_link(table_lines("/proc/net/route")[1:])
    except OSError:
        return None


def ipv4_default_link(lines: Iterable[bytes]) -> str | None:
    """The link of the best default route in the lines of /proc/net/route. Link names may have any bytes."""
    routes = [line.split(b"\t") for line in lines]
    defaults = [
        (int(fields[6]), os.fsdecode(fields[0]))
        for fields in routes
        if len(fields) > 7 and fields[1] == fields[7] == b"00000000" and fields[6].isdigit()
    ]
    return min(defaults)[1] if defaults else None


def _ipv6_uplink() -> str | None:
    try:
        return ipv6_default_link(table_lines("/proc/net/ipv6_route"))
    except OSError:
        return None


def ipv6_default_link(lines: Iterable[bytes]) -> str | None:
    """The link of the best default route in the lines of /proc/net/ipv6_route."""
    routes = [line.split(maxsplit=9) for line in lines]
    defaults = [
        (int(fields[5], 16), os.fsdecode(fields[9].strip(b" ")))
        for fields in routes
        if len(fields) > 9
        and fields[0] == b"0" * 32
        and fields[1] == b"00"
        and fields[4] != b"0" * 32
        and _METRIC.fullmatch(fields[5])
    ]
    return min((route for route in defaults if route[1] != "lo"), default=(0, None))[1]


def _read(name: str) -> str:
    try:
        return (_NET / name).read_text().strip()
    except FileNotFoundError:
        return ""


def _write(name: str, value: str) -> None:
    if _read(name) != value:
        (_NET / name).write_text(value)
