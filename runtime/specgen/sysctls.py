"""The sysctls of a pod: those that it may set, and the defaults."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from host.errors import InvalidArgumentError
from proto.runtime.v1 import cri_pb2

DEFAULTS: Mapping[str, str] = MappingProxyType(
    {"net.ipv4.ping_group_range": "0 2147483647", "net.ipv4.ip_unprivileged_port_start": "0"}
)

_NAME = re.compile(r"[A-Za-z0-9_-]+([./][A-Za-z0-9_-]+)+")
_OF_LINK = re.compile(r"net\.\w+\.(conf|neigh)\.(?!(all|default|lo)\.)")
_IPC_NAMES = ("kernel.shm", "kernel.msg", "fs.mqueue.")


def pod_sysctls(
    config: cri_pb2.PodSandboxConfig,
    *,
    host_network: bool,
    host_ipc: bool,
    user_namespace: bool = False,
    defaults: Mapping[str, str] = DEFAULTS,
) -> dict[str, str]:
    """Settings to write in the pod's namespaces, by dotted name; see ``sysctl_path``.

    Only names of the pod's own namespaces are allowed. Others belong to the node and are refused with
    InvalidArgumentError. In a user namespace the default ping_group_range is left out: its groups are not all mapped.
    """
    settings = {} if host_network else dict(defaults)
    if user_namespace:
        settings.pop("net.ipv4.ping_group_range", None)
    for given, value in config.linux.sysctls.items():
        name = _dotted(given)
        if "\n" in value or "\0" in value:
            raise InvalidArgumentError(f"sysctl {name}: the value holds a line break or NUL byte: remove it")
        if is_of_network(name):
            own, option = not host_network, "host network"
        elif is_of_ipc(name):
            own, option = not host_ipc, "host IPC"
        else:
            raise InvalidArgumentError(
                f"sysctl {name} is not namespaced, it would change the whole node: "
                "pods may set net.*, kernel.shm*, kernel.msg*, kernel.sem and fs.mqueue.*"
            )
        if not own:
            raise InvalidArgumentError(f"sysctl {name} is not allowed with {option}: it would change the whole node")
        settings[name] = value
    return settings


def is_of_network(name: str) -> bool:
    """Whether a dotted name belongs to the network namespace."""
    return name.startswith("net.") and _NAME.fullmatch(name) is not None


def is_of_ipc(name: str) -> bool:
    """Whether a dotted name belongs to the IPC namespace."""
    return (name.startswith(_IPC_NAMES) or name == "kernel.sem") and _NAME.fullmatch(name) is not None


def is_of_link(name: str) -> bool:
    """Whether a dotted name belongs to one network interface, so that it exists only after the pod is attached."""
    return _OF_LINK.match(name) is not None


def sysctl_path(name: str) -> str:
    """The file of a dotted name. A slash in it means a dot, as in ``net.ipv4.conf.eth0/100.forwarding``."""
    return "/proc/sys/" + name.translate(str.maketrans("./", "/."))


def _dotted(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise InvalidArgumentError(
            f"sysctl {name!r} is not a name: use words joined by dots such as net.ipv4.ip_forward"
        )
    separator = min((name.find(mark), mark) for mark in "./" if mark in name)[1]
    return name if separator == "." else name.translate(str.maketrans("./", "/."))
