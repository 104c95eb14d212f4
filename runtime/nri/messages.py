"""Pods and containers as messages for plugins."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import lru_cache

from proto.nri.v1alpha1 import nri_pb2
from proto.runtime.v1 import cri_pb2
from runtime.specgen import config as oci
from runtime.state.container import Container, ContainerState
from runtime.state.sandbox import Sandbox

_MESSAGE_LIMIT = 3 << 20  # of one Synchronize; a ttrpc message may have 4 MiB
_MAX_ITEM_BYTES = (4 << 20) - (64 << 10)
_log = logging.getLogger("podkeel.nri")
_STATES = {
    ContainerState.CREATED: nri_pb2.CONTAINER_CREATED,
    ContainerState.RUNNING: nri_pb2.CONTAINER_RUNNING,
    ContainerState.EXITED: nri_pb2.CONTAINER_STOPPED,
    ContainerState.REMOVING: nri_pb2.CONTAINER_STOPPED,
}
_PROFILES = {
    cri_pb2.SecurityProfile.RuntimeDefault: nri_pb2.SecurityProfile.RUNTIME_DEFAULT,
    cri_pb2.SecurityProfile.Unconfined: nri_pb2.SecurityProfile.UNCONFINED,
    cri_pb2.SecurityProfile.Localhost: nri_pb2.SecurityProfile.LOCALHOST,
}
_NAMESPACES = {"net": "network", "uts": "uts", "ipc": "ipc", "user": "user", "pid": "pid"}


def pod(sandbox: Sandbox, cgroup: str) -> nri_pb2.PodSandbox:
    """The message of a pod; ``cgroup`` is the path of its cgroup below the mount of each hierarchy."""
    config, record, folder = sandbox.config, sandbox.record, sandbox.folder
    message = nri_pb2.PodSandbox(
        id=sandbox.id,
        name=config.metadata.name,
        uid=config.metadata.uid,
        namespace=config.metadata.namespace,
        labels=config.labels,
        annotations=config.annotations,
        runtime_handler=record.requested_handler,
        ips=record.addresses,
    )
    linux = message.linux
    linux.cgroup_parent = record.cgroup_parent
    linux.cgroups_path = cgroup
    kinds = [*sandbox.own_namespaces, *(["user"] if sandbox.user_namespace else [])]
    if record.pid_holder is not None:
        message.pid = record.pid_holder.pid
        kinds.append("pid")
    pins = folder.namespaces
    for kind in kinds:
        linux.namespaces.add(type=_NAMESPACES[kind], path=f"{pins}/{kind}")
    for stored, target in ((record.overhead, linux.pod_overhead), (record.resources, linux.pod_resources)):
        target.CopyFrom(resources(cri_pb2.LinuxContainerResources.FromString(stored)) if stored else _NO_RESOURCES)
    return message


def container(of: Container, spec: oci.Spec | None) -> nri_pb2.Container:
    """The message of a container; ``spec`` is its OCI configuration, None if the file is gone."""
    config, record = of.config, of.record
    message = nri_pb2.Container(
        id=of.id,
        pod_sandbox_id=of.sandbox.id,
        name=config.metadata.name,
        labels=config.labels,
        annotations=config.annotations,
        created_at=record.created_at,
        image=nri_pb2.Image(name=config.image.image, digest=record.image_ref, config_digest=record.image_id),
    )
    message.MergeFrom(status(of))
    for device in config.CDI_devices:
        message.CDI_devices.add(name=device.name)
    if spec is not None:
        _add_process(message, spec)
        _add_linux(message, config, spec.linux)
        message.mounts.extend(_mount(m.destination, m.type, m.source, tuple(m.options)) for m in spec.mounts)
        if spec.hooks is not None:
            message.hooks.CopyFrom(_hooks(spec.hooks))
    return message


def status(of: Container, state: nri_pb2.ContainerState | None = None) -> nri_pb2.Container:
    """The fields that change while a container exists, without resources. ``state`` replaces the recorded state."""
    record = of.record
    if state is None:
        state = _STATES.get(record.state, nri_pb2.CONTAINER_UNKNOWN)
    ended = nri_pb2.CONTAINER_STOPPED
    alive = ended not in (state, _STATES.get(record.state))
    return nri_pb2.Container(
        state=state,
        pid=record.init.pid if alive and record.init is not None else 0,
        started_at=record.started_at,
        finished_at=record.finished_at,
        exit_code=record.exit_code,
        status_reason=record.reason,
        status_message=record.message,
    )


STATUS = ("state", "pid", "started_at", "finished_at", "exit_code", "status_reason", "status_message")
"""The fields that ``status`` sets."""


def set_current(message: nri_pb2.LinuxResources, stored: bytes, block_io_class: str | None) -> None:
    """Put the resources of a container's record into ``message``, which has those that it was created with."""
    current = resources(cri_pb2.LinuxContainerResources.FromString(stored))
    if current.hugepage_limits:
        message.ClearField("hugepage_limits")
    message.MergeFrom(current)
    if block_io_class is not None:
        message.blockio_class.value = block_io_class


def _add_process(message: nri_pb2.Container, spec: oci.Spec) -> None:
    process = spec.process
    message.args[:] = process.args
    message.env[:] = process.env
    user = process.user
    message.user.CopyFrom(nri_pb2.User(uid=user.uid, gid=user.gid, additional_gids=user.additional_gids))
    for limit in process.rlimits:
        message.rlimits.add(type=limit.type, hard=limit.hard, soft=limit.soft)


def _add_linux(message: nri_pb2.Container, config: cri_pb2.ContainerConfig, linux: oci.Linux) -> None:
    target = message.linux
    for namespace in linux.namespaces:
        target.namespaces.add(type=namespace.type, path=namespace.path)
    target.devices.extend(_device(device) for device in linux.devices)
    target.cgroups_path = linux.cgroups_path
    target.resources.CopyFrom(resources(config.linux.resources))
    if linux.resources is not None:
        for rule in linux.resources.devices:
            target.resources.devices.append(_rule(rule))
        if linux.resources.pids is not None:
            target.resources.pids.limit = linux.resources.pids.limit
    target.oom_score_adj.value = config.linux.resources.oom_score_adj
    seccomp = config.linux.security_context.seccomp
    if config.linux.security_context.HasField("seccomp"):
        target.seccomp_profile.profile_type = _PROFILES.get(seccomp.profile_type, nri_pb2.SecurityProfile.UNCONFINED)
        target.seccomp_profile.localhost_ref = seccomp.localhost_ref


@lru_cache(maxsize=128)
def _mount(destination: str, kind: str, source: str, options: tuple[str, ...]) -> nri_pb2.Mount:
    """A mount, to be copied: most containers have the same mounts of the kernel's file systems."""
    return nri_pb2.Mount(destination=destination, type=kind, source=source, options=options)


def _device(device: oci.Device) -> nri_pb2.LinuxDevice:
    message = nri_pb2.LinuxDevice(path=device.path, type=device.type, major=device.major or 0, minor=device.minor or 0)
    if device.file_mode is not None:
        message.file_mode.value = device.file_mode
    if device.uid is not None:
        message.uid.value = device.uid
    if device.gid is not None:
        message.gid.value = device.gid
    return message


def _rule(rule: oci.DeviceRule) -> nri_pb2.LinuxDeviceCgroup:
    message = nri_pb2.LinuxDeviceCgroup(allow=rule.allow, type=rule.type, access=rule.access)
    if rule.major is not None:
        message.major.value = rule.major
    if rule.minor is not None:
        message.minor.value = rule.minor
    return message


def _hooks(hooks: oci.Hooks) -> nri_pb2.Hooks:
    message = nri_pb2.Hooks()
    for stage in ("prestart", "create_runtime", "create_container", "start_container", "poststart", "poststop"):
        for hook in getattr(hooks, stage):
            added = getattr(message, stage).add(path=hook.path, args=hook.args, env=hook.env)
            if hook.timeout is not None:
                added.timeout.value = hook.timeout
    return message


def resources(given: cri_pb2.LinuxContainerResources) -> nri_pb2.LinuxResources:
    """The CRI's resources as a message for plugins. A value that is 0 in the CRI is left unset."""
    message = nri_pb2.LinuxResources()
    for value, field in (
        (given.memory_limit_in_bytes, message.memory.limit),
        (given.memory_swap_limit_in_bytes, message.memory.swap),
        (given.cpu_shares, message.cpu.shares),
        (given.cpu_quota, message.cpu.quota),
        (given.cpu_period, message.cpu.period),
    ):
        if value:
            field.value = value
    message.cpu.cpus, message.cpu.mems = given.cpuset_cpus, given.cpuset_mems
    for page in given.hugepage_limits:
        message.hugepage_limits.add(page_size=page.page_size, limit=page.limit)
    message.unified.update(given.unified)
    return message


_NO_RESOURCES = resources(cri_pb2.LinuxContainerResources())


def cri_resources(given: nri_pb2.LinuxResources) -> cri_pb2.LinuxContainerResources:
    """The part of a plugin's update for which the CRI has fields."""
    memory, cpu = given.memory, given.cpu
    message = cri_pb2.LinuxContainerResources(
        memory_limit_in_bytes=memory.limit.value,
        memory_swap_limit_in_bytes=memory.swap.value,
        cpu_shares=min(cpu.shares.value, 2**63 - 1),
        cpu_quota=cpu.quota.value,
        cpu_period=min(cpu.period.value, 2**63 - 1),
        cpuset_cpus=cpu.cpus,
        cpuset_mems=cpu.mems,
        unified=given.unified,
    )
    for page in given.hugepage_limits:
        message.hugepage_limits.add(page_size=page.page_size, limit=page.limit)
    return message


def split(
    pods: Sequence[nri_pb2.PodSandbox], containers: Sequence[nri_pb2.Container], limit: int = _MESSAGE_LIMIT
) -> Iterable[nri_pb2.SynchronizeRequest]:
    """Distribute pods and containers over as few messages as possible. All but the last have ``more``.

    An object that is too large for a message is left out, so that plugins still get all others.
    """
    request, size = nri_pb2.SynchronizeRequest(), 0
    for kind, items in (("pods", pods), ("containers", containers)):
        for item in items:
            if item.ByteSize() > _MAX_ITEM_BYTES:
                _log.warning("nri: %s %s: left out of the lists for plugins: it is too large", kind[:-1], item.id)
                continue
            if size and size + item.ByteSize() > limit:
                request.more = True
                yield request
                request, size = nri_pb2.SynchronizeRequest(), 0
            getattr(request, kind).append(item)
            size += item.ByteSize() + 8
    yield request
