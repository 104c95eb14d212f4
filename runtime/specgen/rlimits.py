"""Resource limits of the container's processes (setrlimit(2))."""

from __future__ import annotations

import resource
from collections.abc import Sequence

from host.errors import InvalidArgumentError
from runtime.specgen import config
from runtime.specgen.node_facts import NodeFacts


def rlimits(configured: Sequence[config.Rlimit], node: NodeFacts) -> list[config.Rlimit]:
    """The node's defaults with the configured ones over them; open files never above what the agent may give."""
    limits = {limit.type: limit for limit in node.default_rlimits}
    for limit in configured:
        if not limit.type.startswith("RLIMIT_") or not hasattr(resource, limit.type):
            raise InvalidArgumentError(f"{limit.type} is not a resource limit: see setrlimit(2) for the names")
        if limit.soft > limit.hard:
            raise InvalidArgumentError(f"{limit.type}: the soft limit {limit.soft} is above the hard one {limit.hard}")
        limits[limit.type] = limit
    files = limits.get("RLIMIT_NOFILE")
    if files is not None and files.hard > node.max_open_files:
        most = node.max_open_files
        limits["RLIMIT_NOFILE"] = config.Rlimit(type="RLIMIT_NOFILE", hard=most, soft=min(files.soft, most))
    return list(limits.values())
