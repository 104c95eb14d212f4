"""Limits of cgroups that no OCI runtime sets, and the memory counters of cgroups."""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from host.concurrency.threads import in_thread
from host.errors import UnsupportedError
from runtime.cgroups import slices
from runtime.cgroups.tree import CgroupTree
from runtime.specgen.config import SCOPE_SUBGROUP

# Weights of block I/O need the scheduler BFQ or, with version 2, the controller's cost model.
_IO_WEIGHTS = {1: ("blkio.bfq.weight", "blkio.weight"), 2: ("io.bfq.weight", "io.weight")}
_NO_LIMIT = 2**63 - 4096  # version 1 shows this value, and both versions read it as no limit


async def set_io_weight(cgroups: CgroupTree, parent: str, weight: int) -> None:
    """Set the weight of a pod's cgroup among the cgroups that use the same disk. The cgroup is created if missing.

    Raises UnsupportedError if the kernel has no weights, CommandError, or OSError.
    """
    if cgroups.driver == "systemd":
        await slices.set_io_weight(slices.slice_name(parent), weight)
    else:
        await in_thread(_write_io_weight, cgroups, parent, weight)


def _write_io_weight(cgroups: CgroupTree, path: str, weight: int) -> None:
    root = cgroups.mounts.get("unified" if cgroups.version == 2 else "blkio")
    if root is None:
        raise UnsupportedError("the blkio cgroup controller is not mounted")
    folder = root / path.lstrip("/")
    folder.mkdir(parents=True, exist_ok=True)
    if cgroups.version == 2:
        for above in reversed(folder.relative_to(root).parents):
            with contextlib.suppress(OSError):
                (root / above / "cgroup.subtree_control").write_text("+io")
    files = [folder / name for name in _IO_WEIGHTS[cgroups.version] if (folder / name).exists()]
    if not files:
        raise UnsupportedError(f"{folder} has none of {', '.join(_IO_WEIGHTS[cgroups.version])}")
    for file in files:
        file.write_text(str(weight))


def lift_cpu_quota(cgroups: CgroupTree, path: str) -> None:
    """Remove the CPU quota of cgroup ``path``. Newer versions of crun set it for the scope above the container too."""
    if cgroups.version == 1:
        (cgroups.mounts["cpu"] / path.lstrip("/") / "cpu.cfs_quota_us").write_text("-1")
        return
    folder = cgroups.mounts["unified"] / path.lstrip("/")
    for group in (folder, folder.parent) if folder.name == SCOPE_SUBGROUP else (folder,):
        (group / "cpu.max").write_text("max")


def limit_huge_pages(cgroups: CgroupTree, path: str, limits: Mapping[str, int]) -> None:
    """Limit the huge pages of cgroup ``path``. ``limits`` has bytes by page size such as ``2MB``."""
    for size, limit in limits.items():
        _huge_page_limit(cgroups, path, size).write_text(str(limit))


def huge_page_limits(cgroups: CgroupTree, path: str, sizes: Iterable[str]) -> dict[str, int]:
    """The present limits of ``sizes``. Sizes that cannot be limited here are left out."""
    limits = {}
    for size in sizes:
        with contextlib.suppress(OSError):
            text = _huge_page_limit(cgroups, path, size).read_text().strip()
            limits[size] = _NO_LIMIT if text == "max" else int(text)
    return limits


def _huge_page_limit(cgroups: CgroupTree, path: str, size: str) -> Path:
    if cgroups.version == 2:
        return cgroups.mounts["unified"] / path.lstrip("/") / f"hugetlb.{size}.max"
    return cgroups.mounts.get("hugetlb", Path("/nowhere")) / path.lstrip("/") / f"hugetlb.{size}.limit_in_bytes"


def settings(cgroups: CgroupTree, path: str, names: Iterable[str]) -> dict[str, str]:
    """The content of the files ``names`` of cgroup ``path``. Files that cannot be read and written again are left out.

    Only for version 2.
    """
    found = {}
    for name in names:
        file = cgroups.mounts["unified"] / path.lstrip("/") / name
        with contextlib.suppress(OSError):
            content = file.read_text().strip()
            if content and file.stat().st_mode & stat.S_IWUSR:
                found[name] = content
    return found


def cpuset(cgroups: CgroupTree, path: str) -> tuple[str, str]:
    """The CPUs and memory nodes that cgroup ``path`` may use, as lists such as ``0-3``; empty if unknown."""
    folder = cgroups.mounts.get("unified" if cgroups.version == 2 else "cpuset", Path("/nowhere")) / path.lstrip("/")
    names = ("cpus.effective", "mems.effective") if cgroups.version == 2 else ("cpus", "mems")
    try:
        cpus, mems = ((folder / f"cpuset.{name}").read_text().strip() for name in names)
    except OSError:
        return "", ""
    return cpus, mems


def set_oom_score_adj(cgroups: CgroupTree, path: str, leader: int, value: int) -> None:
    """Set oom_score_adj of process ``leader`` of cgroup ``path``, and of the processes in the cgroup that have the
    same value.
    """
    pids = cgroups.processes(path)
    if leader not in pids:
        return
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # the container has ended
        old = int(Path(f"/proc/{leader}/oom_score_adj").read_text())
        for pid in (leader, *pids) if old != value else ():
            _change_oom_score_adj(pid, old, value)


def _change_oom_score_adj(pid: int, old: int, new: int) -> None:
    file = Path(f"/proc/{pid}/oom_score_adj")
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        if int(file.read_text()) == old:
            file.write_text(str(new))


def memory_in_use(cgroups: CgroupTree, path: str) -> int:
    """Bytes of cgroup ``path`` that the kernel cannot reclaim: the usage without the page cache."""
    root = cgroups.mounts.get("unified") or cgroups.mounts["memory"]
    folder = root / path.lstrip("/")
    try:
        use = int((folder / ("memory.current" if cgroups.version == 2 else "memory.usage_in_bytes")).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return 0
    names = ("active_file", "inactive_file", "slab_reclaimable")  # not "cache", which includes tmpfs
    return max(0, use - sum(int(stat.get(name, 0)) for name in names))


def memory_events_file(cgroups: CgroupTree, path: str) -> Path:
    """The file that counts kills for lack of memory. On version 2 inotify can watch it."""
    name = "memory.events" if cgroups.version == 2 else "memory.oom_control"
    root = cgroups.mounts.get("unified") or cgroups.mounts["memory"]
    return root / path.lstrip("/") / name


def out_of_memory_kills(cgroups: CgroupTree, path: str) -> int:
    """The number of processes of cgroup ``path`` that the kernel killed for its memory limit."""
    try:
        text = memory_events_file(cgroups, path).read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill ")), 0)
