"""The cgroup files of limits for which the CRI has no field. OCI runtimes ignore some of them."""

from __future__ import annotations

from pathlib import Path

from runtime.cgroups.tree import CgroupTree
from runtime.specgen.limits.extra_limits import ExtraLimits

# With version 1: the controller and the file of each limit. Limits come before those that depend on them.
_V1 = {
    "realtime_period": ("cpu", "cpu.rt_period_us"),
    "realtime_runtime": ("cpu", "cpu.rt_runtime_us"),
    "reservation": ("memory", "memory.soft_limit_in_bytes"),
    "kernel_tcp": ("memory", "memory.kmem.tcp.limit_in_bytes"),
    "swappiness": ("memory", "memory.swappiness"),
    "disable_oom_killer": ("memory", "memory.oom_control"),
    "pids": ("pids", "pids.max"),
}
_V2 = {"reservation": ("unified", "memory.low"), "pids": ("unified", "pids.max")}


def write_extra_limits(cgroups: CgroupTree, path: str, limits: ExtraLimits) -> None:
    """Set the given limits of cgroup ``path``. Raises OSError."""
    for name, file in _files(cgroups, path, limits).items():
        value = getattr(limits, name)
        if name == "pids" or (cgroups.version == 2 and value < 0):
            text = str(value) if value > 0 else "max"
        else:
            text = str(int(value))
        if file.read_text().partition("\n")[0] != text:  # a cgroup with children refuses some, even the same value
            file.write_text(text)


def read_extra_limits(cgroups: CgroupTree, path: str, wanted: ExtraLimits) -> ExtraLimits:
    """The present limits of cgroup ``path``, only those that ``wanted`` has. Raises OSError."""
    found: dict[str, int | bool] = {}
    for name, file in _files(cgroups, path, wanted).items():
        text = file.read_text().strip()
        if name == "disable_oom_killer":
            found[name] = "oom_kill_disable 1" in text
        else:
            found[name] = -1 if text == "max" else int(text)
    return ExtraLimits(**found)  # type: ignore[arg-type]  # by the names of its fields


def _files(cgroups: CgroupTree, path: str, limits: ExtraLimits) -> dict[str, Path]:
    files = _V2 if cgroups.version == 2 else _V1
    return {
        name: cgroups.mounts[controller] / path.lstrip("/") / file
        for name, (controller, file) in files.items()
        if getattr(limits, name) is not None
    }
