"""Kernel settings under /proc/sys/net that a node with pods needs."""

from __future__ import annotations

from pathlib import Path

_NET = Path("/proc/sys/net")


def ipv6_available() -> bool:
    """Whether the kernel has IPv6, switched on."""
    return (_NET / "ipv6/conf").is_dir()


def forward_ipv4(bridge: str) -> None:
    """Let the node route IPv4, and let it send from 127.0.0.1 to pods on this bridge alone."""
    _write("ipv4/ip_forward", "1")
    send_from_localhost(bridge)


def send_from_localhost(interface: str) -> None:
    """Let the node send from 127.0.0.1 through this interface."""
    _write(f"ipv4/conf/{interface}/route_localnet", "1")


def forward_ipv6() -> None:
    """Let the node route IPv6 without losing the routes that routers announced to it."""
    if _read("ipv6/conf/all/forwarding") == "1":
        return
    for interface in (_NET / "ipv6/conf").iterdir():
        # A node that forwards ignores router advertisements unless it is told twice (accept_ra = 2).
        if interface.name not in ("all", "lo") and _read(f"ipv6/conf/{interface.name}/accept_ra") == "1":
            _write(f"ipv6/conf/{interface.name}/accept_ra", "2")
    _write("ipv6/conf/all/forwarding", "1")


def enable_ipv6(interface: str) -> None:
    """Let an interface of the calling thread's namespace have IPv6 addresses, whatever the default there is."""
    _write(f"ipv6/conf/{interface}/disable_ipv6", "0")


def uplink() -> str:
    """The interface of the IPv4 default route, else of the IPv6 one; empty if there is none."""
    return _ipv4_uplink() or _ipv6_uplink() or ""


def uplink_mtu() -> int:
    """The MTU of the uplink; 1500 if there is none."""
    interface = uplink()
    try:
        return int(Path(f"/sys/class/net/{interface}/mtu").read_text()) if interface else 1500
    except OSError:
        return 1500


def _ipv4_uplink() -> str | None:
    routes = [line.split() for line in Path("/proc/net/route").read_text().splitlines()[1:]]
    defaults = [(int(fields[6]), fields[0]) for fields in routes if fields[1] == fields[7] == "00000000"]
    return min(defaults)[1] if defaults else None


def _ipv6_uplink() -> str | None:
    try:
        routes = [line.split() for line in Path("/proc/net/ipv6_route").read_text().splitlines()]
    except OSError:
        return None
    defaults = [
        (int(fields[5], 16), fields[9])
        for fields in routes
        if fields[0] == "0" * 32 and fields[1] == "00" and fields[4] != "0" * 32 and fields[9] != "lo"
    ]
    return min(defaults)[1] if defaults else None


def _read(name: str) -> str:
    try:
        return (_NET / name).read_text().strip()
    except FileNotFoundError:
        return ""


def _write(name: str, value: str) -> None:
    if _read(name) != value:
        (_NET / name).write_text(value)
