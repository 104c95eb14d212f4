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
from runtime.nri.abilities import Field, FieldErrors, RuntimeAbilities
from runtime.nri.answers.merging import removed_name
from runtime.nri.resource_adjustment import adjust_resources
from runtime.specgen import config
from runtime.specgen.mounts.configured import container_path
from runtime.specgen.mounts.private_devices import DEFAULT_NODES
from runtime.specgen.sysctls import is_of_ipc, is_of_network

RESCTRL = Path("/sys/fs/resctrl")

_MAX_ID = 1 << 32
_LAST_ARGUMENT = 5  # of a system call
_DEFAULTS = {f"/dev/{name}": ("c", os.major(number), os.minor(number)) for number, name in DEFAULT_NODES.items()}
_DEADLINE, _REALTIME = "SCHED_DEADLINE", ("SCHED_FIFO", "SCHED_RR")
_NS_GET_NSTYPE = 0xB703  # ioctl_ns(2)
_NAMESPACE_FLAGS = {"network": 1 << 30, "ipc": 1 << 27, "uts": 1 << 26, "pid": 1 << 29, "cgroup": 1 << 25}
_NAME = re.compile(r"[^/\0\n]+")


def adjust_linux(
    linux: nri_pb2.LinuxContainerAdjustment, spec: config.Spec, abilities: RuntimeAbilities, errors: FieldErrors
) -> None:
    """Put the Linux part of an adjustment into ``spec``. Raises the errors of ``adjustment.apply``."""
    _namespaces(linux.namespaces, spec.linux, abilities, errors)
    _sysctls(linux.sysctl, spec.linux, errors)
    _devices(linux.devices, spec.linux, errors)
    if linux.HasField("resources"):
        adjust_resources(linux.resources, spec, abilities, errors)
    if linux.cgroups_path:
        spec.linux.cgroups_path = _cgroups_path(linux.cgroups_path, spec.linux.cgroups_path, abilities, errors)
    if linux.HasField("oom_score_adj"):
        spec.process.oom_score_adj = _oom_score_adj(linux.oom_score_adj.value, abilities, errors)
    if linux.HasField("io_priority"):
        spec.process.io_priority = _io_priority(linux.io_priority, errors)
    if linux.HasField("scheduler"):
        spec.process.scheduler = _scheduler(linux.scheduler, errors)
    if linux.HasField("seccomp_policy"):
        spec.linux.seccomp = msgspec.Raw(msgspec.json.encode(_seccomp(linux.seccomp_policy, errors)))
        spec.annotations.pop("run.oci.seccomp_bpf_data", None)
    _net_devices(linux.net_devices, spec.linux, abilities, errors)
    _rdt(linux, spec.linux, abilities, errors)
    if linux.HasField("memory_policy"):
        spec.linux.memory_policy = _memory_policy(linux.memory_policy, abilities, errors)


def _namespaces(
    given: Iterable[nri_pb2.LinuxNamespace], linux: config.Linux, abilities: RuntimeAbilities, errors: FieldErrors
) -> None:
    changed = {namespace.type: namespace for namespace in linux.namespaces}
    for namespace in given:
        removed = removed_name(namespace.type)
        kind = namespace.type if removed is None else removed
        if kind in ("user", "mount"):
            what = "it cannot be changed: the agent prepares the container's files for the namespace that it has"
            raise errors.unsupported(Field.Namespace, what, kind)
        if kind not in abilities.features.namespaces:
            raise errors.unsupported(Field.Namespace, f"{abilities.title} has no such namespace", kind)
        if removed is not None:
            changed.pop(kind, None)
        elif namespace.path and (not namespace.path.startswith("/") or "\0" in namespace.path):
            raise errors.invalid(Field.Namespace, f"its path {namespace.path!r} is not absolute", kind)
        else:
            changed[kind] = config.Namespace(type=kind, path=namespace.path)
    linux.namespaces = list(changed.values())


def require_namespace(kind: str, path: str, errors: FieldErrors) -> None:
    """Refuse a path that is no namespace of that kind. Blocks.

    An OCI runtime would open the path, and hang if it is a pipe. Raises InvalidArgumentError, which names the plugin.
    """
    try:
        with contextlib.ExitStack() as stack:
            found = os.open(path, os.O_PATH | os.O_CLOEXEC)
            stack.callback(os.close, found)
            if os.fstat(found).st_dev != Path("/proc/self/ns/net").stat().st_dev:
                raise errors.invalid(Field.Namespace, f"{path} is not a namespace", kind)
            namespace = os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, namespace)
            flag = fcntl.ioctl(namespace, _NS_GET_NSTYPE)
    except OSError as error:
        raise errors.invalid(Field.Namespace, f"its path {path!r} cannot be used: {error.strerror}", kind) from error
    if flag != _NAMESPACE_FLAGS.get(kind, flag):
        raise errors.invalid(Field.Namespace, f"{path} is a namespace of another kind", kind)


def _sysctls(given: Mapping[str, str], linux: config.Linux, errors: FieldErrors) -> None:
    own = {namespace.type for namespace in linux.namespaces}
    for name, value in given.items():
        removed = removed_name(name)
        if removed is not None:
            linux.sysctl.pop(removed, None)
            continue
        needed = "network" if is_of_network(name) else "ipc" if is_of_ipc(name) else None
        if needed is None:
            raise errors.invalid(Field.Sysctl, "it is not namespaced: it would change the whole node", name)
        if needed not in own:
            what = f"the container has the node's {needed} namespace: it would change the whole node"
            raise errors.invalid(Field.Sysctl, what, name)
        if "\n" in value or "\0" in value:
            raise errors.invalid(Field.Sysctl, "its value has a line break or NUL byte", name)
        linux.sysctl[name] = value


def _devices(given: Iterable[nri_pb2.LinuxDevice], linux: config.Linux, errors: FieldErrors) -> None:
    for device in given:
        removed = removed_name(device.path)
        path = _inside(device.path if removed is None else removed, errors)
        old = [node for node in linux.devices if node.path == path]
        linux.devices = [node for node in linux.devices if node.path != path]
        for node in old:
            _forget_rule(node, linux)
        if removed is not None:
            continue
        if device.type not in ("b", "c", "u", "p") or device.major < 0 or device.minor < 0:
            what = f"type {device.type!r}, {device.major}:{device.minor} is no device: use b, c, u or p and its number"
            raise errors.invalid(Field.Devices, what, path)
        if device.major >= _MAX_ID or device.minor >= _MAX_ID:
            raise errors.invalid(Field.Devices, f"there is no device {device.major}:{device.minor}", path)
        numbered = device.type != "p"
        if path in _DEFAULTS and (device.type, device.major, device.minor) != _DEFAULTS[path]:
            raise errors.invalid(
                Field.Devices, "only the device that every container has at this path is allowed", path
            )
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


def _inside(path: str, errors: FieldErrors) -> str:
    try:
        return container_path(path, "its path")
    except InvalidArgumentError as error:
        raise errors.invalid(Field.Devices, error.message, path) from None


def _rule(node: config.Device) -> config.DeviceRule:
    return config.DeviceRule(allow=True, type=node.type, major=node.major, minor=node.minor, access="rwm")


def _forget_rule(node: config.Device, linux: config.Linux) -> None:
    """Remove the rule of a removed device, unless another node of the container is the same device."""
    if linux.resources is not None and all(
        (other.type, other.major, other.minor) != (node.type, node.major, node.minor) for other in linux.devices
    ):
        linux.resources.devices = [
            rule
            for rule in linux.resources.devices
            if not rule.allow or (rule.type, rule.major, rule.minor) != (node.type, node.major, node.minor)
        ]


def _cgroups_path(path: str, before: str, abilities: RuntimeAbilities, errors: FieldErrors) -> str:
    own = re.split("[/:]", before)[-1]
    parts = path.split(":") if abilities.systemd_cgroups else path.split("/")
    if abilities.systemd_cgroups:
        if len(parts) != 3 or not parts[0].endswith(".slice") or not all(map(_NAME.fullmatch, parts)):
            raise errors.invalid(Field.CgroupsPath, f"{path!r} does not have systemd's form name.slice:prefix:name")
    elif not path.startswith("/") or {"", ".", ".."} & set(parts[1:]) or "\0" in path or ":" in path:
        raise errors.invalid(Field.CgroupsPath, f"{path!r} is not an absolute path below / without '..'")
    if not parts[-1].endswith(own):
        what = f"{path!r} must end with the container's id: the agent recognizes its cgroups by it"
        raise errors.unsupported(Field.CgroupsPath, what)
    return path


def _oom_score_adj(value: int, abilities: RuntimeAbilities, errors: FieldErrors) -> int:
    if not -1000 <= value <= 1000:
        raise errors.invalid(Field.OomScoreAdj, f"{value} is out of range: use -1000 to 1000")
    if value < abilities.node.min_oom_score_adj:
        lowest = abilities.node.min_oom_score_adj
        raise errors.unsupported(
            Field.OomScoreAdj, f"{value} is below {lowest}, the lowest that this agent may set without CAP_SYS_RESOURCE"
        )
    return value


def _io_priority(given: nri_pb2.LinuxIOPriority, errors: FieldErrors) -> config.IOPriority | None:
    name = getattr(given, "class")
    if name == nri_pb2.IOPRIO_CLASS_NONE:
        return None
    if name not in nri_pb2.IOPrioClass.values() or not 0 <= given.priority <= 7:
        raise errors.invalid(Field.IoPriority, f"priority {given.priority} of class {name} is out of range: use 0 to 7")
    return config.IOPriority(class_=nri_pb2.IOPrioClass.Name(name), priority=given.priority)


def _scheduler(given: nri_pb2.LinuxScheduler, errors: FieldErrors) -> config.Scheduler | None:
    if given.policy == nri_pb2.SCHED_NONE:
        return None
    if given.policy not in nri_pb2.LinuxSchedulerPolicy.values() or given.policy == nri_pb2.SCHED_ISO:
        raise errors.invalid(Field.LinuxSched, f"the kernel does not know the policy {given.policy}")
    policy = nri_pb2.LinuxSchedulerPolicy.Name(given.policy)
    if not -20 <= given.nice <= 19:
        raise errors.invalid(Field.LinuxSched, f"nice {given.nice} is out of range: use -20 to 19")
    if not (1 <= given.priority <= 99 if policy in _REALTIME else given.priority == 0):
        raise errors.invalid(
            Field.LinuxSched, f"priority {given.priority}: {policy} has none; use 1 to 99 for SCHED_FIFO and SCHED_RR"
        )
    if policy == _DEADLINE and not 0 < given.runtime <= given.deadline <= given.period:
        raise errors.invalid(Field.LinuxSched, "SCHED_DEADLINE needs 0 < runtime <= deadline <= period")
    if any(flag not in nri_pb2.LinuxSchedulerFlag.values() for flag in given.flags):
        raise errors.invalid(Field.LinuxSched, f"one of the flags {list(given.flags)} is unknown")
    return config.Scheduler(
        policy=policy,
        nice=given.nice,
        priority=given.priority,
        flags=[nri_pb2.LinuxSchedulerFlag.Name(flag) for flag in given.flags],
        runtime=given.runtime,
        deadline=given.deadline,
        period=given.period,
    )


def _seccomp(given: nri_pb2.LinuxSeccomp, errors: FieldErrors) -> dict[str, Any]:
    _require_names(errors, "SCMP_ACT_", (given.default_action, *(call.action for call in given.syscalls)))
    _require_names(errors, "SCMP_ARCH_", given.architectures)
    _require_names(errors, "SECCOMP_FILTER_FLAG_", given.flags)
    _require_names(errors, "SCMP_CMP_", (arg.op for call in given.syscalls for arg in call.args))
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
    policy["syscalls"] = [_system_call(call, errors) for call in given.syscalls]
    return policy


def _system_call(call: nri_pb2.LinuxSyscall, errors: FieldErrors) -> dict[str, Any]:
    if not call.names or not all(call.names):
        raise errors.invalid(Field.SeccompPolicy, "a rule names no system call")
    if any(arg.index > _LAST_ARGUMENT for arg in call.args):
        raise errors.invalid(Field.SeccompPolicy, f"a system call has the arguments 0 to {_LAST_ARGUMENT} only")
    rule: dict[str, Any] = {"names": list(call.names), "action": call.action}
    if call.HasField("errno_ret"):
        rule["errnoRet"] = call.errno_ret.value
    if call.args:
        rule["args"] = [
            {"index": arg.index, "value": arg.value, "valueTwo": arg.value_two, "op": arg.op} for arg in call.args
        ]
    return rule


def _require_names(errors: FieldErrors, prefix: str, names: Iterable[str]) -> None:
    for name in names:
        if not re.fullmatch(prefix + r"[A-Z0-9_]+", name):
            raise errors.invalid(Field.SeccompPolicy, f"{name!r} is none of {prefix}*")


def _net_devices(
    given: Mapping[str, nri_pb2.LinuxNetDevice], linux: config.Linux, abilities: RuntimeAbilities, errors: FieldErrors
) -> None:
    for name, device in given.items():
        removed = removed_name(name)
        if removed is not None:
            linux.net_devices.pop(removed, None)
            continue
        if not abilities.features.net_devices:
            raise errors.unsupported(Field.LinuxNetDevices, f"{abilities.title} cannot move network devices", name)
        if all(namespace.type != "network" for namespace in linux.namespaces):
            raise errors.invalid(Field.LinuxNetDevices, "the container has the node's network namespace", name)
        linux.net_devices[name] = config.NetDevice(name=device.name)


def _rdt(
    given: nri_pb2.LinuxContainerAdjustment, linux: config.Linux, abilities: RuntimeAbilities, errors: FieldErrors
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
        raise errors.unsupported(number, f"this node has no {RESCTRL}: its CPU lacks RDT, or resctrl is not mounted")
    if name and rdt.clos_id.value not in ("", name):
        raise errors.invalid(Field.RdtClass, f"it differs from {rdt.clos_id.value}, the container's RdtClosID", name)
    if not re.fullmatch(r"[^/\0\n]*", wanted.clos_id) or wanted.clos_id in (".", ".."):
        raise errors.invalid(number, f"{wanted.clos_id!r} is not a name of a group")
    if name and not (RESCTRL / name).is_dir():
        raise errors.invalid(Field.RdtClass, f"{RESCTRL / name} does not exist: create the class first", name)
    if wanted.schemata and not abilities.features.rdt_schemata:
        raise errors.unsupported(Field.RdtSchemata, f"{abilities.title} does not support schemata")
    if wanted.enable_monitoring and not abilities.features.rdt_monitoring:
        raise errors.unsupported(Field.RdtEnableMonitoring, f"{abilities.title} does not make monitoring groups")
    linux.intel_rdt = wanted


def _memory_policy(
    given: nri_pb2.LinuxMemoryPolicy, abilities: RuntimeAbilities, errors: FieldErrors
) -> config.MemoryPolicy:
    if given.mode not in nri_pb2.MpolMode.values() or any(f not in nri_pb2.MpolFlag.values() for f in given.flags):
        raise errors.invalid(
            Field.MemoryPolicy, f"mode {given.mode} or one of the flags {list(given.flags)} is unknown"
        )
    mode = nri_pb2.MpolMode.Name(given.mode)
    if mode not in abilities.features.memory_policies:
        raise errors.unsupported(Field.MemoryPolicy, f"{abilities.title} does not support {mode}")
    return config.MemoryPolicy(
        mode=mode, nodes=given.nodes, flags=[nri_pb2.MpolFlag.Name(flag) for flag in given.flags]
    )
