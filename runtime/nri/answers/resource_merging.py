"""Merges the Linux resources that several plugins set. Each value has one owner."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.message import Message

from host.errors import InvalidArgumentError
from proto.nri.v1alpha1 import nri_pb2
from runtime.nri.answers.owners import Owners

Field = nri_pb2.Field

# The fields of LinuxMemory and LinuxCPU, each with the number of the field under which its owner is recorded.
_MEMORY = {
    "limit": Field.MemLimit,
    "reservation": Field.MemReservation,
    "swap": Field.MemSwapLimit,
    "kernel": Field.MemKernelLimit,
    "kernel_tcp": Field.MemTCPLimit,
    "swappiness": Field.MemSwappiness,
    "disable_oom_killer": Field.MemDisableOomKiller,
    "use_hierarchy": Field.MemUseHierarchy,
}
_CPU = {
    "shares": Field.CPUShares,
    "quota": Field.CPUQuota,
    "period": Field.CPUPeriod,
    "realtime_runtime": Field.CPURealtimeRuntime,
    "realtime_period": Field.CPURealtimePeriod,
}
_CPU_SETS = {"cpus": Field.CPUSetCPUs, "mems": Field.CPUSetMems}
_CLASSES = {"blockio_class": Field.BlockioClass, "rdt_class": Field.RdtClass}


def merge_resources(
    given: nri_pb2.LinuxResources, targets: Sequence[nri_pb2.LinuxResources], owners: Owners, plugin: str
) -> None:
    """Copy the values that ``given`` sets into each of ``targets``, and make ``plugin`` their owner.

    Raises ConflictError if another plugin owns a value, and InvalidArgumentError for an invalid value.
    """
    for name, number in _MEMORY.items():
        if given.memory.HasField(name):
            owners.claim(number, plugin)
            _copy(getattr(given.memory, name), [getattr(target.memory, name) for target in targets])
    for name, number in _CPU.items():
        if given.cpu.HasField(name):
            owners.claim(number, plugin)
            _copy(getattr(given.cpu, name), [getattr(target.cpu, name) for target in targets])
    for name, number in _CPU_SETS.items():
        if value := getattr(given.cpu, name):
            owners.claim(number, plugin)
            for target in targets:
                setattr(target.cpu, name, value)
    for name, number in _CLASSES.items():
        if given.HasField(name):
            owners.claim(number, plugin)
            _copy(getattr(given, name), [getattr(target, name) for target in targets])
    if given.HasField("pids"):
        owners.claim(Field.PidsLimit, plugin)
        _copy(given.pids, [target.pids for target in targets])
    _merge_keyed(given, targets, owners, plugin)


def _copy(value: Message, targets: Sequence[Message]) -> None:
    for target in targets:
        target.CopyFrom(value)


def _merge_keyed(
    given: nri_pb2.LinuxResources, targets: Sequence[nri_pb2.LinuxResources], owners: Owners, plugin: str
) -> None:
    for page in given.hugepage_limits:
        if not page.page_size:
            raise InvalidArgumentError(f"NRI plugin {plugin}: a huge page limit has no page size")
        owners.claim_key(Field.HugepageLimits, page.page_size, plugin)
        for target in targets:
            others = [other for other in target.hugepage_limits if other.page_size != page.page_size]
            del target.hugepage_limits[:]
            target.hugepage_limits.extend([*others, page])
    for key, value in given.unified.items():
        owners.claim_key(Field.CgroupsUnified, key, plugin)
        for target in targets:
            target.unified[key] = value
    for target in targets:
        target.devices.extend(given.devices)
