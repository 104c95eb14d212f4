"""The abilities of this node, determined once at the start."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import platform
import re
import resource
from dataclasses import dataclass
from pathlib import Path

from host import libc
from host.cgroups import Hierarchies
from runtime.specgen import config
from runtime.specgen.capabilities import NAMES

MAX_OPEN_FILES = 1_048_576

_SYSTEM_RESOURCE = "CAP_SYS_RESOURCE"
_MOUNT_SETATTR = 442

_log = logging.getLogger("podkeel.spec")


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """The abilities of the host that limit specs.

    ``capabilities`` are those that the agent has and can pass on: "ALL" means these. ``min_oom_score_adj`` is the
    lowest value that it may set. ``hugepage_sizes`` are in the cgroup's notation (``2MB``), empty without the hugetlb
    controller. ``apparmor_default`` is the profile for RuntimeDefault, empty if there is none.
    """

    cgroup_version: int
    capabilities: frozenset[str]
    min_oom_score_adj: int
    max_open_files: int
    apparmor_enabled: bool
    selinux_enabled: bool
    swap_accounting: bool
    hugepage_sizes: frozenset[str]
    kernel: tuple[int, int]
    recursive_read_only: bool
    machine: str
    hostname: str
    default_rlimits: tuple[config.Rlimit, ...]
    apparmor_default: str = ""

    @property
    def hugetlb(self) -> bool:
        """Whether huge pages can be limited here."""
        return bool(self.hugepage_sizes)


def probe_node(hierarchies: Hierarchies, *, selinux: bool = True) -> NodeFacts:
    """Query the kernel. Reads a dozen small files: call it in a thread. Missing abilities are logged once, here.

    Without ``selinux`` the node is treated as one without SELinux.
    """
    capabilities = _capabilities()
    lowest = -1000 if _SYSTEM_RESOURCE in capabilities else int(_read("/proc/self/oom_score_adj") or "0")
    if lowest > -1000:
        _log.warning(
            "oom_score_adj: values below %d need CAP_SYS_RESOURCE: containers that ask for less get %d",
            lowest,
            lowest,
        )
    open_files = _open_files_limit()
    limit = min(MAX_OPEN_FILES, open_files)
    return NodeFacts(
        cgroup_version=hierarchies.version,
        capabilities=capabilities,
        min_oom_score_adj=lowest,
        max_open_files=open_files,
        apparmor_enabled=_read("/sys/module/apparmor/parameters/enabled").startswith("Y"),
        selinux_enabled=selinux and _selinux_enabled(),
        swap_accounting=hierarchies.counts_swap(),
        hugepage_sizes=hierarchies.huge_page_sizes(),
        kernel=kernel_version(platform.release()),
        recursive_read_only=_has_mount_setattr(),
        machine=platform.machine(),
        hostname=platform.node(),
        default_rlimits=(config.Rlimit(type="RLIMIT_NOFILE", hard=limit, soft=limit), _core_limit()),
    )


def kernel_version(release: str) -> tuple[int, int]:
    """``6.18.44-x`` as (6, 18); (0, 0) if it is not a release."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _capabilities() -> frozenset[str]:
    status = _read("/proc/self/status")
    sets = {name: int(value, 16) for name, value in re.findall(r"^Cap(Eff|Bnd):\s+([0-9a-f]+)$", status, re.MULTILINE)}
    both = sets.get("Eff", 0) & sets.get("Bnd", 0)
    return frozenset(name for bit, name in enumerate(NAMES) if both >> bit & 1)


def _open_files_limit() -> int:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return hard if hard != resource.RLIM_INFINITY else MAX_OPEN_FILES


def _core_limit() -> config.Rlimit:
    """The highest limit that the agent may set: its own soft limit is 0, which containers would inherit."""
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1] % (
        1 << 64
    )  # RLIM_INFINITY is -1 in Python, 2^64 - 1 in the spec
    return config.Rlimit(type="RLIMIT_CORE", hard=hard, soft=hard)


def _selinux_enabled() -> bool:
    if not Path("/sys/fs/selinux/enforce").exists():
        return False
    return _read("/proc/self/attr/current").rstrip("\0\n") not in ("", "kernel")


def _has_mount_setattr() -> bool:
    try:
        libc.syscall(_MOUNT_SETATTR, ctypes.c_int(-1), b"", ctypes.c_uint(0), None, ctypes.c_size_t(0))
    except OSError as error:
        return error.errno != errno.ENOSYS
    return True


def _read(path: str) -> str:
    try:
        return os.fsdecode(Path(path).read_bytes())
    except OSError:
        return ""
