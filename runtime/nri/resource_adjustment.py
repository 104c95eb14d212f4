"""Resources from plugins: put into the spec of a container that is made, or applied to an existing one."""

from __future__ import annotations

from host.errors import InvalidArgumentError
from proto.nri.v1alpha1 import nri_pb2
from proto.runtime.v1 import cri_pb2
from runtime.nri.abilities import Asking, Field, RuntimeAbilities
from runtime.nri.messages import cri_resources
from runtime.specgen import config
from runtime.specgen.limits.extra_limits import ExtraLimits
from runtime.specgen.limits.resources import resources
from runtime.specgen.node_facts import NodeFacts

_LARGEST = 1 << 63


def adjust_resources(
    given: nri_pb2.LinuxResources, spec: config.Spec, abilities: RuntimeAbilities, asking: Asking
) -> None:
    """Put resources into ``spec``: what is not given stays. The classes of RDT and block I/O are the caller's."""
    if given.blockio_class.value and not abilities.block_io_file:
        what = "the node has no classes of block I/O: set nri.blockio_config_file"
        raise asking.unsupported(Field.BlockioClass, what, given.blockio_class.value)
    if spec.linux.resources is None:
        spec.linux.resources = config.Resources()
    now = spec.linux.resources
    extra = extra_limits(given, abilities.node, asking)
    merged = _as_cri(now)
    _overlay(merged, given)
    try:
        checked = resources(merged, abilities.node)
    except InvalidArgumentError as error:
        raise type(error)(f"{_subject(asking)}: {error.message}") from error
    now.cpu, now.memory = checked.cpu, checked.memory
    pages = {page.page_size: page for page in (*now.hugepage_limits, *checked.hugepage_limits)}
    now.hugepage_limits = list(pages.values())
    now.unified = {**now.unified, **checked.unified}
    extra.put_into(now)
    if extra.pids is not None and "org.systemd.property.TasksMax" in spec.annotations:
        tasks = extra.pids if extra.pids > 0 else 2**64 - 1
        spec.annotations["org.systemd.property.TasksMax"] = f"uint64 {tasks}"
    for rule in given.devices:
        now.devices.append(_rule(rule, asking))


def extra_limits(given: nri_pb2.LinuxResources, node: NodeFacts, asking: Asking) -> ExtraLimits:
    """The given limits for which the CRI has no field.

    Raises InvalidArgumentError, or UnsupportedError for those that this kernel does not have or this agent cannot set.
    """
    memory, cpu = given.memory, given.cpu
    for number, is_set, what in (
        (Field.MemKernelLimit, memory.HasField("kernel"), "the kernel has no such limit any more: limit the memory"),
        (
            Field.MemUseHierarchy,
            memory.HasField("use_hierarchy") and not memory.use_hierarchy.value,
            "the kernel counts the memory of cgroups below always: leave it out, or true",
        ),
    ):
        if is_set:
            raise asking.unsupported(number, what)
    for number, is_set in (
        (Field.MemTCPLimit, memory.HasField("kernel_tcp")),
        (Field.MemSwappiness, memory.HasField("swappiness")),
        (Field.MemDisableOomKiller, memory.disable_oom_killer.value),
        (Field.CPURealtimeRuntime, bool(cpu.realtime_runtime.value)),
        (Field.CPURealtimePeriod, bool(cpu.realtime_period.value)),
    ):
        if is_set and node.cgroup_version == 2:
            raise asking.unsupported(number, "cgroup v2 has no such setting")
    if memory.swappiness.value > 100:
        raise asking.wrong(Field.MemSwappiness, f"{memory.swappiness.value} is out of range: use 0 to 100")
    for number, value in (
        (Field.MemReservation, memory.reservation.value),
        (Field.MemTCPLimit, memory.kernel_tcp.value),
        (Field.CPURealtimeRuntime, cpu.realtime_runtime.value),
    ):
        if value < -1:
            raise asking.wrong(number, f"{value} is negative: use -1 for no limit")
    if cpu.realtime_period.value >= _LARGEST:
        raise asking.wrong(Field.CPURealtimePeriod, f"{cpu.realtime_period.value} is out of range")
    return ExtraLimits(
        reservation=memory.reservation.value or None,
        kernel_tcp=memory.kernel_tcp.value or None,
        swappiness=memory.swappiness.value if memory.HasField("swappiness") else None,
        disable_oom_killer=memory.disable_oom_killer.value if memory.HasField("disable_oom_killer") else None,
        realtime_runtime=cpu.realtime_runtime.value or None,
        realtime_period=cpu.realtime_period.value or None,
        pids=max(given.pids.limit, 0) or -1 if given.HasField("pids") else None,
        block_io_class=given.blockio_class.value if given.HasField("blockio_class") else None,
    )


def _subject(asking: Asking) -> str:
    """The plugins that set any of the resources, as the check does not say which one it refuses."""
    fields = {
        *(number for number in asking.owners.simple if Field.MemLimit <= number <= Field.CPUSetMems),
        *(number for number in asking.owners.compound if number in (Field.HugepageLimits, Field.CgroupsUnified)),
    }
    plugins = dict.fromkeys(asking.plugin(number) for number in sorted(fields))
    return f"NRI plugin {','.join(plugins) or '(unknown)'}: linux.resources"


def _as_cri(now: config.Resources) -> cri_pb2.LinuxContainerResources:
    cpu, memory = now.cpu or config.Cpu(), now.memory or config.Memory()
    return cri_pb2.LinuxContainerResources(
        cpu_shares=cpu.shares or 0,
        cpu_quota=cpu.quota or 0,
        cpu_period=cpu.period or 0,
        cpuset_cpus=cpu.cpus,
        cpuset_mems=cpu.mems,
        memory_limit_in_bytes=memory.limit or 0,
        memory_swap_limit_in_bytes=memory.swap or 0,
        unified=now.unified,
    )


def _overlay(merged: cri_pb2.LinuxContainerResources, given: nri_pb2.LinuxResources) -> None:
    """Swap follows a new memory limit that does not set swap."""
    changes = cri_resources(given)
    merged.MergeFrom(changes)
    if changes.memory_limit_in_bytes and not changes.memory_swap_limit_in_bytes:
        merged.memory_swap_limit_in_bytes = 0


def _rule(rule: nri_pb2.LinuxDeviceCgroup, asking: Asking) -> config.DeviceRule:
    access = rule.access or "rwm"
    if rule.type not in ("", "a", "b", "c") or set(access) - set("rwm"):
        raise asking.wrong(
            Field.Devices,
            f"the rule of type {rule.type!r} with access {rule.access!r} is invalid: use a, b or c, and r, w, m",
        )
    return config.DeviceRule(
        allow=rule.allow,
        type=rule.type,
        major=rule.major.value if rule.HasField("major") else None,
        minor=rule.minor.value if rule.HasField("minor") else None,
        access=access,
    )
