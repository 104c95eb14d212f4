"""Limits of a container that the CRI has no field for, as plugins of the node set them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from proto.runtime.v1 import cri_pb2
from runtime.specgen import config


class ExtraLimits(msgspec.Struct, omit_defaults=True, frozen=True):
    """Limits by the names of the OCI spec: bytes, microseconds; None is not set, ``pids`` -1 is no limit.

    ``block_io_class`` is a name for plugins alone: the limits of the class are set when a plugin gives it.
    """

    reservation: int | None = None
    kernel_tcp: int | None = None
    swappiness: int | None = None
    disable_oom_killer: bool | None = None
    realtime_runtime: int | None = None
    realtime_period: int | None = None
    pids: int | None = None
    block_io_class: str | None = None

    def merged(self, later: ExtraLimits) -> ExtraLimits:
        """These, with what ``later`` sets in their place."""
        changes = {name: getattr(later, name) for name in self.__struct_fields__ if getattr(later, name) is not None}
        return msgspec.structs.replace(self, **changes)

    def put_into(self, resources: config.Resources) -> None:
        """Set them in the resources of a spec."""
        for part, kind, names in (
            ("memory", config.Memory, ("reservation", "kernel_tcp", "swappiness", "disable_oom_killer")),
            ("cpu", config.Cpu, ("realtime_runtime", "realtime_period")),
        ):
            changes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
            if changes:
                setattr(resources, part, msgspec.structs.replace(getattr(resources, part) or kind(), **changes))
        if self.pids is not None:
            resources.pids = config.Pids(limit=self.pids) if self.pids > 0 else None  # crun (1.8) fails on -1


@dataclass(frozen=True, slots=True)
class LimitChange:
    """Limits that are to change: those the CRI has fields for, where 0 is not set, and the others.

    ``changed_by`` are the plugins that ask for it, by the names of what they change. ``block_io`` takes the place of
    all that the container has of block I/O, if it is given.
    """

    given: cri_pb2.LinuxContainerResources
    extra: ExtraLimits = field(default_factory=ExtraLimits)
    changed_by: Mapping[str, str] = field(default_factory=dict)
    block_io: config.BlockIO | None = None


def merged(
    before: cri_pb2.LinuxContainerResources, given: cri_pb2.LinuxContainerResources
) -> cri_pb2.LinuxContainerResources:
    """Limits as they are after a change: fields left at 0 stay as they were, page sizes are replaced as a whole."""
    result = cri_pb2.LinuxContainerResources()
    result.CopyFrom(before)
    if given.hugepage_limits:
        del result.hugepage_limits[:]
    result.MergeFrom(given)
    if given.memory_limit_in_bytes and not given.memory_swap_limit_in_bytes:
        result.memory_swap_limit_in_bytes = 0  # follows the new memory limit instead of staying below it
    return result
