"""Masked and read-only paths, and AppArmor profiles."""

from __future__ import annotations

from pathlib import Path

from host.errors import InvalidArgumentError
from proto.runtime.v1 import cri_pb2
from runtime.specgen.node_facts import NodeFacts

MASKED_PATHS = (
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
    *sorted(map(str, Path("/sys/devices/system/cpu").glob("cpu*/thermal_throttle"))),
)
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

_APPARMOR_LOADED = "/sys/kernel/security/apparmor/profiles"


def masked_and_readonly_paths(config: cri_pb2.ContainerConfig) -> tuple[list[str], list[str]]:
    """The paths to mask and those to make read-only.

    kubelet always sends its lists, also empty ones for an unmasked procMount. In the protocol an empty list looks like
    a missing one. So the lists of a security context are used as they are, as containerd does. Only a container without
    any security context gets the default lists, and a privileged one never has any.
    """
    if not config.linux.HasField("security_context"):
        return list(MASKED_PATHS), list(READONLY_PATHS)
    context = config.linux.security_context
    if context.privileged:
        return [], []
    for field, paths in (("masked_paths", context.masked_paths), ("readonly_paths", context.readonly_paths)):
        for path in paths:
            if not path.startswith("/"):
                raise InvalidArgumentError(f"{field}: {path!r} is not absolute: give a path that begins with /")
    return list(context.masked_paths), list(context.readonly_paths)


def apparmor_profile(context: cri_pb2.LinuxContainerSecurityContext, node: NodeFacts, *, default: str) -> str:
    """The name of the AppArmor profile for the process, or empty. The new field has precedence over the old string.

    ``default`` is the node's own profile, used for RuntimeDefault and if nothing is set. It is ignored on a host
    without AppArmor. Raises InvalidArgumentError for a profile of the host that is not loaded.
    """
    if context.privileged:
        return ""
    name = _apparmor_name(context, default)
    if not name or (name == default and not node.apparmor_enabled):
        return ""
    if not node.apparmor_enabled:
        raise InvalidArgumentError(
            f"apparmor: profile {name!r} cannot be used: this node has no AppArmor; use RuntimeDefault or Unconfined"
        )
    if name != default and not _apparmor_loaded(name):
        raise InvalidArgumentError(
            f"apparmor: profile {name!r} is not loaded: load it with apparmor_parser on the node"
        )
    return name


def _apparmor_name(context: cri_pb2.LinuxContainerSecurityContext, default: str) -> str:
    if context.HasField("apparmor"):
        profile = context.apparmor
        if profile.profile_type == cri_pb2.SecurityProfile.ProfileType.Unconfined:
            return ""
        if profile.profile_type == cri_pb2.SecurityProfile.ProfileType.RuntimeDefault:
            return default
        if not profile.localhost_ref:
            raise InvalidArgumentError("apparmor: Localhost needs localhost_ref: name a profile loaded on the node")
        return profile.localhost_ref.removeprefix("localhost/")
    old = context.apparmor_profile
    if old in ("", "runtime/default"):
        return default
    if old == "unconfined":
        return ""
    if not old.startswith("localhost/") or old == "localhost/":
        raise InvalidArgumentError(
            f"apparmor_profile {old!r} is unknown: use runtime/default, unconfined or localhost/<profile>"
        )
    return old.removeprefix("localhost/")


def _apparmor_loaded(name: str) -> bool:
    try:
        with open(_APPARMOR_LOADED) as profiles:
            return any(line.rpartition(" (")[0] == name for line in profiles)
    except OSError:
        return False
