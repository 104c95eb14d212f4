"""Applies resources from plugins to the spec of a new container, or to an existing container."""

from __future__ import annotations

from host.errors import InvalidArgumentError
from proto.nri.v1alpha1 import nri_pb2
from proto.runtime.v1 import cri_pb2
from runtime.nri.abilities import Field, FieldErrors, RuntimeAbilities
from runtime.nri.messages import cri_resources
from runtime.specgen import config
from runtime.specgen.limits.extra_limits import ExtraLimits
from runtime.specgen.limits.resources import resources
from runtime.specgen.node_facts import NodeFacts

_INT64_END = 1 << 63


def adjust_resources(
    given: nri_pb2.LinuxResources, spec: config.Spec, abilities: RuntimeAbilities, errors: FieldErrors
) -> None:
    """Put resources into ``spec``; values that are not given stay. The caller sets the classes of RDT and block I/O."""
    if given.blockio_class.value and not abilities.block_io_file:
        what = "the node has no classes of block I/O: set nri.blockio_config_file"
        raise errors.unsupported(Field.BlockioClass, what, given.blockio_class.value)
    if spec.linux.resources is None:
        spec.linux.resources = config.Resources()
    now = spec.linux.resources
    extra = extra_limits(given, abilities.node, errors)
    merged = _as_cri(now)
    _overlay(merged, given)
    try:
        checked = resources(merged, abilities.node)
    except InvalidArgumentError as error:
        raise type(error)(f"{_subject(errors)}: {error.message}") from error
    now.cpu, now.memory = checked.cpu, checked.memory
    pages = {page.page_size: page for page in (*now.hugepage_limits, *checked.hugepage_limits)}
    now.hugepage_limits = list(pages.values())
    now.unified = {**now.unified, **checked.unified}
    extra.set_in(now)
    if extra.pids is not None and "org.systemd.property.TasksMax" in spec.annotations:
        tasks = extra.pids if extra.pids > 0 else 2**64 - 1
        spec.annotations["org.systemd.property.TasksMax"] = f"uint64 {tasks}"
    for rule in given.devices:
        now.devices.append(_rule(rule, errors))


def extra_limits(given: nri_pb2.LinuxResources, node: NodeFacts, errors: FieldErrors) -> ExtraLimits:
    """The given limits for which the CRI has no field.

    Raises InvalidArgumentError for an invalid limit, and UnsupportedError for one that this kernel does not have or
    this agent cannot set.
    """
    memory, cpu = given.memory, given.cpu
    for number, is_set, what in (
        (Field.MemKernelLimit, memory.HasField("kernel"), "the kernel has removed this limit: limit memory instead"),
        (
            Field.MemUseHierarchy,
            memory.HasField("use_hierarchy") and not memory.use_hierarchy.value,
            "the kernel always counts the memory of child cgroups: do not set it, or set it to true",
        ),
    ):
        if is_set:
            raise errors.unsupported(number, what)
    for number, is_set in (
        (Field.MemTCPLimit, memory.HasField("kernel_tcp")),
        (Field.MemSwappiness, memory.HasField("swappiness")),
        (Field.MemDisableOomKiller, memory.disable_oom_killer.value),
        (Field.CPURealtimeRuntime, bool(cpu.realtime_runtime.value)),
        (Field.CPURealtimePeriod, bool(cpu.realtime_period.value)),
    ):
        if is_set and node.cgroup_version == 2:
            raise errors.unsupported(number, "cgroup v2 has no such setting")
    if memory.swappiness.value > 100:
        raise errors.invalid(Field.MemSwappiness, f"{memory.swappiness.value} is out of range: use 0 to 100")
    for number, value in (
        (Field.MemReservation, memory.reservation.value),
        (Field.MemTCPLimit, memory.kernel_tcp.value),
        (Field.CPURealtimeRuntime, cpu.realtime_runtime.value),
    ):
        if value < -1:
            raise errors.invalid(number, f"{value} is negative: use -1 for no limit")
    if cpu.realtime_period.value >= _INT64_END:
        raise errors.invalid(Field.CPURealtimePeriod, f"{cpu.realtime_period.value} is out of range")
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


def _subject(errors: FieldErrors) -> str:
    """The plugins that set any of the resources, because the check does not say which value it refuses."""
    fields = {
        *(number for number in errors.owners.simple if Field.MemLimit <= number <= Field.CPUSetMems),
        *(number for number in errors.owners.compound if number in (Field.HugepageLimits, Field.CgroupsUnified)),
    }
    plugins = dict.fromkeys(errors.plugin(number) for number in sorted(fields))
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
    """Copy the given values. A new memory limit without a swap limit changes the swap limit too."""
    changes = cri_resources(given)
    merged.MergeFrom(changes)
    if changes.memory_limit_in_bytes and not changes.memory_swap_limit_in_bytes:
        merged.memory_swap_limit_in_bytes = 0


def _rule(rule: nri_pb2.LinuxDeviceCgroup, errors: FieldErrors) -> config.DeviceRule:
    access = rule.access or "rwm"
    if rule.type not in ("", "a", "b", "c") or set(access) - set("rwm"):
        raise errors.invalid(
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
