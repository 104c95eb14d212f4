"""Limits of a container for which the CRI has no field. NRI plugins set them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from proto.runtime.v1 import cri_pb2
from runtime.specgen import config


class ExtraLimits(msgspec.Struct, omit_defaults=True, frozen=True):
    """Limits by the names of the OCI spec, in bytes or microseconds. None is not set; ``pids`` -1 is no limit.

    ``block_io_class`` is only a name for plugins. The limits of the class are set when a plugin sets the class.
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
        """These limits, with the limits that ``later`` sets instead."""
        changes = {name: getattr(later, name) for name in self.__struct_fields__ if getattr(later, name) is not None}
        return msgspec.structs.replace(self, **changes)

    def set_in(self, resources: config.Resources) -> None:
        """Set these limits in the resources of a spec."""
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
    """Limits to change: those for which the CRI has fields (0 is not set), and the others.

    ``changed_by`` has the plugins that ask for the change, by field. ``block_io``, if set, replaces all block I/O
    limits of the container.
    """

    given: cri_pb2.LinuxContainerResources
    extra: ExtraLimits = field(default_factory=ExtraLimits)
    changed_by: Mapping[str, str] = field(default_factory=dict)
    block_io: config.BlockIO | None = None


def merged(
    before: cri_pb2.LinuxContainerResources, given: cri_pb2.LinuxContainerResources
) -> cri_pb2.LinuxContainerResources:
    """The limits after a change: fields that are 0 do not change, page sizes are replaced as a whole."""
    result = cri_pb2.LinuxContainerResources()
    result.CopyFrom(before)
    if given.hugepage_limits:
        del result.hugepage_limits[:]
    result.MergeFrom(given)
    if given.memory_limit_in_bytes and not given.memory_swap_limit_in_bytes:
        result.memory_swap_limit_in_bytes = 0  # it follows the new memory limit instead of staying below it
    return result
