"""A container's cgroup settings and oom_score_adj, from the CRI's values and the abilities of the node."""

from __future__ import annotations

import re

from host.errors import InvalidArgumentError
from proto.runtime.v1 import cri_pb2
from runtime.specgen import config
from runtime.specgen.node_facts import NodeFacts

_UNIFIED_KEY = re.compile(r"[a-z]+(\.[A-Za-z0-9_]+)+")
_CPU_LIST = re.compile(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*")  # the kernel has at most 8192 processors

_LEAST_SHARES, _MAX_SHARES = 2, 1 << 18


def resources(given: cri_pb2.LinuxContainerResources, node: NodeFacts, *, pids_limit: int = 0) -> config.Resources:
    """All resources except devices. Zero means not set, as everywhere in the CRI; so does a negative cpu_quota.

    ``pids_limit`` 0 or less means none.
    """
    return config.Resources(
        cpu=_cpu(given),
        memory=_memory(given, node),
        pids=config.Pids(limit=pids_limit) if pids_limit > 0 else None,
        hugepage_limits=_hugepages(given, node),
        unified=_unified(given, node),
    )


def oom_score_adj(given: cri_pb2.LinuxContainerResources, node: NodeFacts) -> int:
    """The value to set, at least the lowest that the agent may set. Always explicit, so that none is inherited."""
    wanted = given.oom_score_adj
    if not -1000 <= wanted <= 1000:
        raise InvalidArgumentError(f"oom_score_adj {wanted} is out of range: use -1000 to 1000")
    return max(wanted, node.min_oom_score_adj)


def _cpu(given: cri_pb2.LinuxContainerResources) -> config.Cpu | None:
    for field, value in (("cpu_shares", given.cpu_shares), ("cpu_period", given.cpu_period)):
        if value < 0:
            raise InvalidArgumentError(f"{field} {value} is negative: leave it at 0 for the default")
    if given.cpu_shares > _MAX_SHARES:
        raise InvalidArgumentError(f"cpu_shares {given.cpu_shares} is above {_MAX_SHARES}, the kernel's most")
    for field, cpus in (("cpuset_cpus", given.cpuset_cpus), ("cpuset_mems", given.cpuset_mems)):
        if cpus and not _CPU_LIST.fullmatch(cpus):
            raise InvalidArgumentError(f"{field} {cpus!r} is not a list of numbers and ranges such as 0-2,7")
    cpu = config.Cpu(
        shares=max(given.cpu_shares, _LEAST_SHARES) if given.cpu_shares else None,  # the kernel makes 1 into 2
        quota=given.cpu_quota if given.cpu_quota > 0 else None,  # crun fails on -1 on cgroup v1
        period=given.cpu_period or None,
        cpus=given.cpuset_cpus,
        mems=given.cpuset_mems,
    )
    return None if cpu == config.Cpu() else cpu


def _memory(given: cri_pb2.LinuxContainerResources, node: NodeFacts) -> config.Memory | None:
    limit, swap = given.memory_limit_in_bytes, given.memory_swap_limit_in_bytes
    for field, value in (("memory_limit_in_bytes", limit), ("memory_swap_limit_in_bytes", swap)):
        if value < -1:
            raise InvalidArgumentError(f"{field} {value} is negative: use -1 for no limit or 0 for the default")
    if swap > 0 and (limit <= 0 or swap < limit):
        raise InvalidArgumentError(
            f"memory_swap_limit_in_bytes {swap} counts memory and swap together: "
            f"it needs a memory_limit_in_bytes no larger than it, not {limit}"
        )
    if not limit and not swap:
        return None
    # A limited container without a swap limit gets no swap, so that its memory limit is the real limit.
    if not swap and "memory.swap.max" not in given.unified:
        swap = limit
    return config.Memory(limit=limit or None, swap=swap or None if node.swap_accounting else None)


def _hugepages(given: cri_pb2.LinuxContainerResources, node: NodeFacts) -> list[config.HugepageLimit]:
    limits: list[config.HugepageLimit] = []
    for page in given.hugepage_limits:
        if page.page_size in node.hugepage_sizes:
            limits.append(config.HugepageLimit(page_size=page.page_size, limit=page.limit))
        elif page.limit:
            have = ", ".join(sorted(node.hugepage_sizes)) or "none, as the hugetlb cgroup controller is missing"
            raise InvalidArgumentError(
                f"hugepage_limits: pages of {page.page_size} cannot be limited on this node (it has {have})"
            )
    return limits


def _unified(given: cri_pb2.LinuxContainerResources, node: NodeFacts) -> dict[str, str]:
    if given.unified and node.cgroup_version == 1:
        raise InvalidArgumentError(
            f"unified: {min(given.unified)} needs cgroup v2 and this node has cgroup v1: use the named fields instead"
        )
    for key in given.unified:
        if not _UNIFIED_KEY.fullmatch(key):
            raise InvalidArgumentError(f"unified: {key!r} is not a file of the cgroup such as memory.high")
    return dict(given.unified)
