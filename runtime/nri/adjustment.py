"""Applies the changes of plugins to a container's OCI spec."""

from __future__ import annotations

import posixpath
import resource
from collections.abc import Iterable
from functools import partial

from host.errors import InvalidArgumentError
from proto.nri.v1alpha1 import nri_pb2
from runtime.nri.abilities import Field, FieldErrors, RuntimeAbilities
from runtime.nri.answers.merging import removed_name
from runtime.nri.linux_adjustment import adjust_linux, require_namespace
from runtime.specgen import config
from runtime.specgen.draft import Draft
from runtime.specgen.limits.block_io import block_io

# Annotations for crun that only the agent sets: the compiled seccomp filter, and the cgroup below a systemd scope.
_AGENT_ANNOTATIONS = ("run.oci.seccomp_bpf_data", "run.oci.systemd.subgroup")
_STAGES = ("prestart", "create_runtime", "create_container", "start_container", "poststart", "poststop")
_PROPAGATION = {"shared": "shared", "rshared": "shared", "slave": "rslave", "rslave": "rslave"}
# OCI runtimes confine the process by writing to files in these mounts. Without them they would write into the image.
_NEEDED_MOUNTS = ("/proc", "/dev")
_KERNEL_TYPES = {"/proc": ("proc", "bind"), "/sys": ("sysfs", "bind"), "/dev": ("tmpfs", "devtmpfs", "bind")}


def adjust(
    draft: Draft, adjustment: nri_pb2.ContainerAdjustment, owners: nri_pb2.FieldOwners, abilities: RuntimeAbilities
) -> None:
    """Put a merged adjustment and its CDI devices into the draft of a container. Raises the errors of ``apply``."""
    apply(adjustment, draft.spec, abilities, owners)
    errors = FieldErrors(owners)
    for device in adjustment.CDI_devices:
        removed = removed_name(device.name)
        draft.cdi_devices = [name for name in draft.cdi_devices if name not in (removed, device.name)]
        if removed is None:
            draft.cdi_devices.append(device.name)
            draft.cdi_asked_by[device.name] = f"NRI plugin {errors.plugin(Field.CdiDevices, device.name)}: CDI device"
    if name := adjustment.linux.resources.blockio_class.value:
        draft.last_steps.append(partial(_set_block_io, draft.spec.linux, abilities.block_io_file, name, errors))
    for namespace in draft.spec.linux.namespaces if adjustment.linux.namespaces else ():
        if namespace.path:
            draft.last_steps.append(partial(require_namespace, namespace.type, namespace.path, errors))
    for mount in adjustment.mounts:
        draft.asked_by[_cleaned(mount.destination)] = (
            f"NRI plugin {errors.plugin(Field.Mounts, mount.destination)}: mount"
        )


def _set_block_io(linux: config.Linux, file: str, name: str, errors: FieldErrors) -> None:
    linux.resources = linux.resources or config.Resources()
    try:
        linux.resources.block_io = block_io(file, name)
    except InvalidArgumentError as error:
        raise errors.invalid(Field.BlockioClass, error.message, name) from error


def apply(
    adjustment: nri_pb2.ContainerAdjustment,
    spec: config.Spec,
    abilities: RuntimeAbilities,
    owners: nri_pb2.FieldOwners,
) -> None:
    """Put the changes of plugins into ``spec``, whose paths are not resolved yet. No file is read or written.

    A name with a leading ``-`` removes an entry of the container; a value that is set replaces the old one. CDI devices
    are not part of the spec: ``adjust`` adds them. Mounts and devices that stay are the same objects as before.

    Raises InvalidArgumentError for an invalid value, and UnsupportedError for a value that the node, the handler's OCI
    runtime or this agent does not support. Both name the plugin and the field.
    """
    errors = FieldErrors(owners)
    _annotations(adjustment, spec, errors)
    _environment(adjustment, spec.process)
    if adjustment.args:
        spec.process.args = list(adjustment.args)
    _mounts(adjustment.mounts, spec, errors)
    _hooks(adjustment.hooks, spec, errors)
    _rlimits(adjustment.rlimits, spec.process, abilities, errors)
    if adjustment.HasField("linux"):
        adjust_linux(adjustment.linux, spec, abilities, errors)


def _annotations(adjustment: nri_pb2.ContainerAdjustment, spec: config.Spec, errors: FieldErrors) -> None:
    for key, value in adjustment.annotations.items():
        removed = removed_name(key)
        if (removed or key) in _AGENT_ANNOTATIONS:
            raise errors.invalid(Field.Annotations, "only the agent may set this annotation: do not change it", key)
        if removed is None:
            spec.annotations[key] = value
        else:
            spec.annotations.pop(removed, None)


def _environment(adjustment: nri_pb2.ContainerAdjustment, process: config.Process) -> None:
    changed = {removed_name(entry.key) or entry.key for entry in adjustment.env}
    if changed:
        kept = [entry for entry in process.env if entry.partition("=")[0] not in changed]
        added = [f"{entry.key}={entry.value}" for entry in adjustment.env if removed_name(entry.key) is None]
        process.env = kept + added


def _cleaned(path: str) -> str:
    return posixpath.normpath("/" + path.lstrip("/"))


def _mounts(mounts: Iterable[nri_pb2.Mount], spec: config.Spec, errors: FieldErrors) -> None:
    wanted: dict[str, config.Mount | None] = {}
    for mount in mounts:
        removed = removed_name(mount.destination)
        given = mount.destination if removed is None else removed
        if not given.startswith("/") or ".." in given.split("/") or "\0" in given or _cleaned(given) == "/":
            raise errors.invalid(Field.Mounts, "it is not an absolute path below / without '..'", given)
        destination = _cleaned(given)
        if removed is not None:
            wanted.setdefault(destination, None)
            continue
        wanted[destination] = _mount(mount, destination, errors)
        wanted_propagation = {_PROPAGATION[option] for option in mount.options if option in _PROPAGATION}
        if "shared" in wanted_propagation:
            spec.linux.rootfs_propagation = "shared"
        elif wanted_propagation and not spec.linux.rootfs_propagation:
            spec.linux.rootfs_propagation = "rslave"
    if not wanted:
        return
    for destination in _NEEDED_MOUNTS:
        if destination in wanted and wanted[destination] is None:
            raise errors.invalid(
                Field.Mounts, "no container runs without this mount: replace it or keep it", f"-{destination}"
            )
    kept = [mount for mount in spec.mounts if mount.destination not in wanted]
    added = [mount for mount in wanted.values() if mount is not None]
    spec.mounts = sorted((*kept, *added), key=lambda mount: mount.destination.count("/"))


def _mount(mount: nri_pb2.Mount, destination: str, errors: FieldErrors) -> config.Mount:
    options = list(mount.options)
    kind = mount.type or "bind"
    if kind == "bind" or {"bind", "rbind"} & set(options):
        kind = "bind"
        if not mount.source.startswith("/") or "\0" in mount.source:
            raise errors.invalid(Field.Mounts, f"its source {mount.source!r} is not an absolute path", destination)
        if not {"bind", "rbind"} & set(options):
            options = ["rbind", *options]
    allowed = _KERNEL_TYPES.get(destination)
    if allowed is not None and kind not in allowed:
        raise errors.invalid(Field.Mounts, f"only {' or '.join(allowed)} can be mounted here, not {kind}", destination)
    if kind != "bind" and destination.startswith("/proc/"):
        raise errors.invalid(Field.Mounts, "only files of the node can be bind mounted below /proc", destination)
    return config.Mount(destination=destination, type=kind, source=mount.source, options=options)


def _hooks(hooks: nri_pb2.Hooks, spec: config.Spec, errors: FieldErrors) -> None:
    for stage in _STAGES:
        for hook in getattr(hooks, stage):
            if not hook.path.startswith("/") or "\0" in hook.path:
                raise errors.invalid(Field.OciHooks, f"the hook's path {hook.path!r} is not absolute")
            timeout = hook.timeout.value if hook.HasField("timeout") else None
            if timeout is not None and not 0 < timeout < 1 << 31:
                raise errors.invalid(Field.OciHooks, f"the timeout {timeout} of {hook.path} must be above 0 seconds")
            if spec.hooks is None:
                spec.hooks = config.Hooks()
            made = config.Hook(path=hook.path, args=list(hook.args), env=list(hook.env), timeout=timeout)
            getattr(spec.hooks, stage).append(made)


def _rlimits(
    limits: Iterable[nri_pb2.POSIXRlimit], process: config.Process, abilities: RuntimeAbilities, errors: FieldErrors
) -> None:
    unlimited = "CAP_SYS_RESOURCE" in abilities.node.capabilities
    changed = {limit.type: limit for limit in process.rlimits}
    for limit in limits:
        removed = removed_name(limit.type)
        if removed is not None:
            changed.pop(removed, None)
            continue
        if not limit.type.startswith("RLIMIT_") or not hasattr(resource, limit.type):
            raise errors.invalid(Field.Rlimits, "it is not the name of a limit of setrlimit(2)", limit.type)
        if limit.soft > limit.hard:
            raise errors.invalid(Field.Rlimits, f"soft limit {limit.soft} is above hard limit {limit.hard}", limit.type)
        most = resource.getrlimit(getattr(resource, limit.type))[1] % (1 << 64)
        if limit.hard > most and not unlimited:
            what = f"{limit.hard} is above {most}, the highest limit that this agent may set without CAP_SYS_RESOURCE"
            raise errors.unsupported(Field.Rlimits, what, limit.type)
        changed[limit.type] = config.Rlimit(type=limit.type, hard=limit.hard, soft=limit.soft)
    process.rlimits = list(changed.values())
