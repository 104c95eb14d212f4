"""The capabilities of a container (capabilities(7))."""

from __future__ import annotations

from collections.abc import Iterable

from host.errors import InvalidArgumentError
from proto.runtime.v1 import cri_pb2
from runtime.specgen import config

NAMES = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
)
"""By bit number, as in /proc/pid/status."""

DEFAULT = frozenset(
    (
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FSETID",
        "CAP_FOWNER",
        "CAP_MKNOD",
        "CAP_NET_RAW",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETFCAP",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_CHROOT",
        "CAP_KILL",
        "CAP_AUDIT_WRITE",
    )
)
"""The default set, which images expect: the same as in other container engines."""

_KNOWN = frozenset(NAMES)


def capability_sets(
    context: cri_pb2.LinuxContainerSecurityContext, available: frozenset[str]
) -> tuple[config.Capabilities, frozenset[str]]:
    """The five sets for the spec, and the permitted ones as a set.

    ``ALL`` means those ``available`` on this node. Inheritable has only the ambient ones, so that no program in the
    image gains capabilities by its file attributes alone.
    """
    wanted = context.capabilities
    added, add_all = _names(wanted.add_capabilities, "add_capabilities")
    dropped, drop_all = _names(wanted.drop_capabilities, "drop_capabilities")
    ambient, ambient_all = _names(wanted.add_ambient_capabilities, "add_ambient_capabilities")
    missing = sorted((added | ambient) - available)
    if missing and not context.privileged:
        raise InvalidArgumentError(
            f"capability {missing[0]} cannot be given: this node's agent does not have it; do not add it, "
            "or run the agent with it"
        )
    if context.privileged:
        permitted = available
    else:
        permitted = available if add_all else DEFAULT & available
        if drop_all:
            permitted = frozenset()
        permitted = (permitted | added | ambient) - (dropped - ambient)
    ambient = (permitted if ambient_all else ambient) & available
    ordered = [name for name in NAMES if name in permitted]
    raised = [name for name in NAMES if name in ambient]
    return (
        config.Capabilities(bounding=ordered, effective=ordered, permitted=ordered, inheritable=raised, ambient=raised),
        permitted,
    )


def _names(given: Iterable[str], field: str) -> tuple[frozenset[str], bool]:
    """The names with their prefix, and whether ``ALL`` was among them."""
    names = {name.upper() for name in given}
    everything = bool(names & {"ALL", "CAP_ALL"})
    full = frozenset(name if name.startswith("CAP_") else "CAP_" + name for name in names - {"ALL", "CAP_ALL"})
    unknown = sorted(full - _KNOWN)
    if unknown:
        raise InvalidArgumentError(f"{field}: {unknown[0]} is not a capability: see capabilities(7) for the names")
    return full, everything
