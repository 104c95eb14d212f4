"""Applies the Linux part of plugins' adjustments: devices, namespaces, sysctls, scheduling, seccomp, cgroup, RDT."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from host.errors import InvalidArgumentError
from proto.nri.v1alpha1 import nri_pb2
from runtime.nri.abilities import Asking, Field, RuntimeAbilities
from runtime.nri.answers.merging import removed_name
from runtime.nri.resource_adjustment import adjust_resources
from runtime.specgen import config
from runtime.specgen.mounts.configured import container_path
from runtime.specgen.mounts.private_devices import DEFAULT_NODES
from runtime.specgen.sysctls import is_of_ipc, is_of_network

RESCTRL = Path("/sys/fs/resctrl")

_LARGEST_ID = 1 << 32
_LAST_ARGUMENT = 5  # of a system call
_DEFAULTS = {f"/dev/{name}": ("c", os.major(number), os.minor(number)) for number, name in DEFAULT_NODES.items()}
_DEADLINE, _REALTIME = "SCHED_DEADLINE", ("SCHED_FIFO", "SCHED_RR")
_NS_GET_NSTYPE = 0xB703  # ioctl_ns(2)
_NAMESPACE_FLAGS = {"network": 1 << 30, "ipc": 1 << 27, "uts": 1 << 26, "pid": 1 << 29, "cgroup": 1 << 25}
_NAME = re.compile(r"[^/\0\n]+")


def adjust_linux(
    linux: nri_pb2.LinuxContainerAdjustment, spec: config.Spec, abilities: RuntimeAbilities, asking: Asking
) -> None:
    """Put the Linux part of an adjustment into ``spec``; see ``adjustment.apply``."""
    _namespaces(linux.namespaces, spec.linux, abilities, asking)
    _sysctls(linux.sysctl, spec.linux, asking)
    _devices(linux.devices, spec.linux, asking)
    if linux.HasField("resources"):
        adjust_resources(linux.resources, spec, abilities, asking)
    if linux.cgroups_path:
        spec.linux.cgroups_path = _cgroups_path(linux.cgroups_path, spec.linux.cgroups_path, abilities, asking)
    if linux.HasField("oom_score_adj"):
        spec.process.oom_score_adj = _oom_score_adj(linux.oom_score_adj.value, abilities, asking)
    if linux.HasField("io_priority"):
        spec.process.io_priority = _io_priority(linux.io_priority, asking)
    if linux.HasField("scheduler"):
        spec.process.scheduler = _scheduler(linux.scheduler, asking)
    if linux.HasField("seccomp_policy"):
        spec.linux.seccomp = msgspec.Raw(msgspec.json.encode(_seccomp(linux.seccomp_policy, asking)))
        spec.annotations.pop("run.oci.seccomp_bpf_data", None)
    _net_devices(linux.net_devices, spec.linux, abilities, asking)
    _rdt(linux, spec.linux, abilities, asking)
    if linux.HasField("memory_policy"):
        spec.linux.memory_policy = _memory_policy(linux.memory_policy, abilities, asking)


def _namespaces(
    given: Iterable[nri_pb2.LinuxNamespace], linux: config.Linux, abilities: RuntimeAbilities, asking: Asking
) -> None:
    changed = {namespace.type: namespace for namespace in linux.namespaces}
    for namespace in given:
        removed = removed_name(namespace.type)
        kind = namespace.type if removed is None else removed
        if kind in ("user", "mount"):
            what = "the agent makes the container's files for the one it has: it cannot be changed"
            raise asking.unsupported(Field.Namespace, what, kind)
        if kind not in abilities.features.namespaces:
            raise asking.unsupported(Field.Namespace, f"{abilities.title} has no such namespace", kind)
        if removed is not None:
            changed.pop(kind, None)
        elif namespace.path and (not namespace.path.startswith("/") or "\0" in namespace.path):
            raise asking.wrong(Field.Namespace, f"its path {namespace.path!r} is not absolute", kind)
        else:
            changed[kind] = config.Namespace(type=kind, path=namespace.path)
    linux.namespaces = list(changed.values())


def require_namespace(kind: str, path: str, asking: Asking) -> None:
    """Refuse a path that is no namespace of that kind: an OCI runtime would open it, and wait if it is a pipe. Blocks.

    Raises InvalidArgumentError, which names the plugin.
    """
    try:
        with contextlib.ExitStack() as stack:
            found = os.open(path, os.O_PATH | os.O_CLOEXEC)
            stack.callback(os.close, found)
            if os.fstat(found).st_dev != Path("/proc/self/ns/net").stat().st_dev:
                raise asking.wrong(Field.Namespace, f"{path} is no namespace", kind)
            namespace = os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, namespace)
            flag = fcntl.ioctl(namespace, _NS_GET_NSTYPE)
    except OSError as error:
        raise asking.wrong(Field.Namespace, f"its path {path!r} cannot be used: {error.strerror}", kind) from error
    if flag != _NAMESPACE_FLAGS.get(kind, flag):
        raise asking.wrong(Field.Namespace, f"{path} is a namespace of another kind", kind)


def _sysctls(given: Mapping[str, str], linux: config.Linux, asking: Asking) -> None:
    own = {namespace.type for namespace in linux.namespaces}
    for name, value in given.items():
        removed = removed_name(name)
        if removed is not None:
            linux.sysctl.pop(removed, None)
            continue
        needed = "network" if is_of_network(name) else "ipc" if is_of_ipc(name) else None
        if needed is None:
            raise asking.wrong(Field.Sysctl, "it is not namespaced, it would change the whole node", name)
        if needed not in own:
            what = f"the container has the node's {needed} namespace: it would change the whole node"
            raise asking.wrong(Field.Sysctl, what, name)
        if "\n" in value or "\0" in value:
            raise asking.wrong(Field.Sysctl, "the value holds a line break or NUL byte", name)
        linux.sysctl[name] = value


def _devices(given: Iterable[nri_pb2.LinuxDevice], linux: config.Linux, asking: Asking) -> None:
    for device in given:
        removed = removed_name(device.path)
        path = _inside(device.path if removed is None else removed, asking)
        old = [node for node in linux.devices if node.path == path]
        linux.devices = [node for node in linux.devices if node.path != path]
        for node in old:
            _forget_rule(node, linux)
        if removed is not None:
            continue
        if device.type not in ("b", "c", "u", "p") or device.major < 0 or device.minor < 0:
            what = f"type {device.type!r}, {device.major}:{device.minor} is no device: give b, c, u or p and its number"
            raise asking.wrong(Field.Devices, what, path)
        if device.major >= _LARGEST_ID or device.minor >= _LARGEST_ID:
            raise asking.wrong(Field.Devices, f"there is no device {device.major}:{device.minor}", path)
        numbered = device.type != "p"
        if path in _DEFAULTS and (device.type, device.major, device.minor) != _DEFAULTS[path]:
            raise asking.wrong(Field.Devices, "only the device that every container has at this path is allowed", path)
        node = config.Device(
            path=path,
            type="c" if device.type == "u" else device.type,
            major=device.major if numbered else None,
            minor=device.minor if numbered else None,
            file_mode=device.file_mode.value & 0o7777 if device.HasField("file_mode") else None,
            uid=device.uid.value if device.HasField("uid") else None,
            gid=device.gid.value if device.HasField("gid") else None,
        )
        linux.devices.append(node)
        if numbered and linux.resources is not None:
            linux.resources.devices.append(_rule(node))


def _inside(path: str, asking: Asking) -> str:
    try:
        return container_path(path, "its path")
    except InvalidArgumentError as error:
        raise asking.wrong(Field.Devices, error.message, path) from None


def _rule(node: config.Device) -> config.DeviceRule:
    return config.DeviceRule(allow=True, type=node.type, major=node.major, minor=node.minor, access="rwm")


def _forget_rule(node: config.Device, linux: config.Linux) -> None:
    """Close a device that is removed, unless another node of the container is the same device."""
    if linux.resources is not None and all(
        (other.type, other.major, other.minor) != (node.type, node.major, node.minor) for other in linux.devices
    ):
        linux.resources.devices = [
            rule
            for rule in linux.resources.devices
            if not rule.allow or (rule.type, rule.major, rule.minor) != (node.type, node.major, node.minor)
        ]


def _cgroups_path(path: str, before: str, abilities: RuntimeAbilities, asking: Asking) -> str:
    own = re.split("[/:]", before)[-1]
    parts = path.split(":") if abilities.systemd_cgroups else path.split("/")
    if abilities.systemd_cgroups:
        if len(parts) != 3 or not parts[0].endswith(".slice") or not all(map(_NAME.fullmatch, parts)):
            raise asking.wrong(Field.CgroupsPath, f"{path!r} is not of systemd's form name.slice:prefix:name")
    elif not path.startswith("/") or {"", ".", ".."} & set(parts[1:]) or "\0" in path or ":" in path:
        raise asking.wrong(Field.CgroupsPath, f"{path!r} is not an absolute path below the root without '..'")
    if own not in parts[-1]:
        what = f"{path!r} must end with the id of the container, by which the agent knows its cgroups"
        raise asking.unsupported(Field.CgroupsPath, what)
    return path


def _oom_score_adj(value: int, abilities: RuntimeAbilities, asking: Asking) -> int:
    if not -1000 <= value <= 1000:
        raise asking.wrong(Field.OomScoreAdj, f"{value} is out of range: use -1000 to 1000")
    if value < abilities.node.min_oom_score_adj:
        lowest = abilities.node.min_oom_score_adj
        raise asking.unsupported(
            Field.OomScoreAdj, f"{value} is below {lowest}, the lowest that this agent may set without CAP_SYS_RESOURCE"
        )
    return value


def _io_priority(given: nri_pb2.LinuxIOPriority, asking: Asking) -> config.IOPriority | None:
    name = getattr(given, "class")
    if name == nri_pb2.IOPRIO_CLASS_NONE:
        return None
    if name not in nri_pb2.IOPrioClass.values() or not 0 <= given.priority <= 7:
        raise asking.wrong(Field.IoPriority, f"class {name} with priority {given.priority}: use priorities from 0 to 7")
    return config.IOPriority(class_=nri_pb2.IOPrioClass.Name(name), priority=given.priority)


def _scheduler(given: nri_pb2.LinuxScheduler, asking: Asking) -> config.Scheduler | None:
    if given.policy == nri_pb2.SCHED_NONE:
        return None
    if given.policy not in nri_pb2.LinuxSchedulerPolicy.values() or given.policy == nri_pb2.SCHED_ISO:
        raise asking.wrong(Field.LinuxSched, f"the kernel has no policy {given.policy}")
    policy = nri_pb2.LinuxSchedulerPolicy.Name(given.policy)
    if not -20 <= given.nice <= 19:
        raise asking.wrong(Field.LinuxSched, f"nice {given.nice} is out of range: use -20 to 19")
    if not (1 <= given.priority <= 99 if policy in _REALTIME else given.priority == 0):
        raise asking.wrong(
            Field.LinuxSched, f"priority {given.priority}: {policy} takes none, SCHED_FIFO and _RR 1 to 99"
        )
    if policy == _DEADLINE and not 0 < given.runtime <= given.deadline <= given.period:
        raise asking.wrong(Field.LinuxSched, "SCHED_DEADLINE needs 0 < runtime <= deadline <= period")
    if any(flag not in nri_pb2.LinuxSchedulerFlag.values() for flag in given.flags):
        raise asking.wrong(Field.LinuxSched, f"flags {list(given.flags)} are not all known")
    return config.Scheduler(
        policy=policy,
        nice=given.nice,
        priority=given.priority,
        flags=[nri_pb2.LinuxSchedulerFlag.Name(flag) for flag in given.flags],
        runtime=given.runtime,
        deadline=given.deadline,
        period=given.period,
    )


def _seccomp(given: nri_pb2.LinuxSeccomp, asking: Asking) -> dict[str, Any]:
    _require_names(asking, "SCMP_ACT_", (given.default_action, *(call.action for call in given.syscalls)))
    _require_names(asking, "SCMP_ARCH_", given.architectures)
    _require_names(asking, "SECCOMP_FILTER_FLAG_", given.flags)
    _require_names(asking, "SCMP_CMP_", (arg.op for call in given.syscalls for arg in call.args))
    policy: dict[str, Any] = {"defaultAction": given.default_action}
    if given.HasField("default_errno"):
        policy["defaultErrnoRet"] = given.default_errno.value
    for name, value in (
        ("architectures", list(given.architectures)),
        ("flags", list(given.flags)),
        ("listenerPath", given.listener_path),
        ("listenerMetadata", given.listener_metadata),
    ):
        if value:
            policy[name] = value
    policy["syscalls"] = [_system_call(call, asking) for call in given.syscalls]
    return policy


def _system_call(call: nri_pb2.LinuxSyscall, asking: Asking) -> dict[str, Any]:
    if not call.names or not all(call.names):
        raise asking.wrong(Field.SeccompPolicy, "a rule names no system call")
    if any(arg.index > _LAST_ARGUMENT for arg in call.args):
        raise asking.wrong(Field.SeccompPolicy, f"a system call has the arguments 0 to {_LAST_ARGUMENT}, not more")
    rule: dict[str, Any] = {"names": list(call.names), "action": call.action}
    if call.HasField("errno_ret"):
        rule["errnoRet"] = call.errno_ret.value
    if call.args:
        rule["args"] = [
            {"index": arg.index, "value": arg.value, "valueTwo": arg.value_two, "op": arg.op} for arg in call.args
        ]
    return rule


def _require_names(asking: Asking, prefix: str, names: Iterable[str]) -> None:
    for name in names:
        if not re.fullmatch(prefix + r"[A-Z0-9_]+", name):
            raise asking.wrong(Field.SeccompPolicy, f"{name!r} is not one of {prefix}*")


def _net_devices(
    given: Mapping[str, nri_pb2.LinuxNetDevice], linux: config.Linux, abilities: RuntimeAbilities, asking: Asking
) -> None:
    for name, device in given.items():
        removed = removed_name(name)
        if removed is not None:
            linux.net_devices.pop(removed, None)
            continue
        if not abilities.features.net_devices:
            raise asking.unsupported(Field.LinuxNetDevices, f"{abilities.title} moves no network devices", name)
        if all(namespace.type != "network" for namespace in linux.namespaces):
            raise asking.wrong(Field.LinuxNetDevices, "the container has the node's network namespace", name)
        linux.net_devices[name] = config.NetDevice(name=device.name)


def _rdt(
    given: nri_pb2.LinuxContainerAdjustment, linux: config.Linux, abilities: RuntimeAbilities, asking: Asking
) -> None:
    rdt = given.rdt
    name = given.resources.rdt_class.value
    if rdt.remove:
        linux.intel_rdt = None
    wanted = config.IntelRdt(
        clos_id=rdt.clos_id.value or name,
        schemata=list(rdt.schemata.value),
        enable_monitoring=rdt.enable_monitoring.value,
    )
    if wanted == config.IntelRdt():
        return
    number = next(
        number
        for number, is_set in (
            (Field.RdtClass, bool(name)),
            (Field.RdtClosID, bool(rdt.clos_id.value)),
            (Field.RdtSchemata, bool(wanted.schemata)),
            (Field.RdtEnableMonitoring, wanted.enable_monitoring),
        )
        if is_set
    )
    if not (RESCTRL / "schemata").exists():
        raise asking.unsupported(number, f"this node has no {RESCTRL}: its CPU lacks RDT, or nothing has mounted it")
    if name and rdt.clos_id.value not in ("", name):
        raise asking.wrong(Field.RdtClass, f"it is not {rdt.clos_id.value}, the RdtClosID of the same container", name)
    if not re.fullmatch(r"[^/\0\n]*", wanted.clos_id) or wanted.clos_id in (".", ".."):
        raise asking.wrong(number, f"{wanted.clos_id!r} is not the name of a group")
    if name and not (RESCTRL / name).is_dir():
        raise asking.wrong(Field.RdtClass, f"there is no {RESCTRL / name}: make the class first", name)
    if wanted.schemata and not abilities.features.rdt_schemata:
        raise asking.unsupported(Field.RdtSchemata, f"{abilities.title} takes no schemata")
    if wanted.enable_monitoring and not abilities.features.rdt_monitoring:
        raise asking.unsupported(Field.RdtEnableMonitoring, f"{abilities.title} makes no monitoring groups")
    linux.intel_rdt = wanted


def _memory_policy(
    given: nri_pb2.LinuxMemoryPolicy, abilities: RuntimeAbilities, asking: Asking
) -> config.MemoryPolicy:
    if given.mode not in nri_pb2.MpolMode.values() or any(f not in nri_pb2.MpolFlag.values() for f in given.flags):
        raise asking.wrong(Field.MemoryPolicy, f"mode {given.mode} or one of flags {list(given.flags)} is not known")
    mode = nri_pb2.MpolMode.Name(given.mode)
    if mode not in abilities.features.memory_policies:
        raise asking.unsupported(Field.MemoryPolicy, f"{abilities.title} does not set {mode}")
    return config.MemoryPolicy(
        mode=mode, nodes=given.nodes, flags=[nri_pb2.MpolFlag.Name(flag) for flag in given.flags]
    )
