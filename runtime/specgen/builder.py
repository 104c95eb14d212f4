"""Completes a draft to the OCI spec of a container: resolves paths, then creates missing host folders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from host.errors import InvalidArgumentError
from proto.runtime.v1 import cri_pb2
from runtime.specgen import cdi
from runtime.specgen import config as oci
from runtime.specgen.devices import described_devices
from runtime.specgen.draft import Draft, SpecRequest, draft, naming_container
from runtime.specgen.mounts.configured import volumes_to_relabel
from runtime.specgen.mounts.container_paths import Place
from runtime.specgen.mounts.destinations import MountGroups, changed_groups, settle
from runtime.specgen.mounts.host_paths import require_propagation
from runtime.specgen.mounts.idmapped import MappedVolume
from runtime.specgen.mounts.image_volumes import Volume
from runtime.specgen.mounts.kernel_places import (
    kernel_folders_last,
    refuse_imitations,
    refuse_missing,
    refuse_nested,
)
from runtime.specgen.mounts.masks import mask_files
from runtime.specgen.mounts.private_devices import PrivateDevices, prepare
from runtime.specgen.mounts.shared_volumes import without_shared_mounts
from runtime.specgen.process import settled_directory
from runtime.specgen.security.relabel import relabel_all
from runtime.specgen.security.selinux import Relabel, SelinuxLabels
from runtime.specgen.signals import StopSignal, stop_signal


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerSpec:
    """A built spec, and the data for the container's status and its stop.

    ``volumes`` must still be made with ``volumes.make_volumes``, ``private_devices`` made and ``mapped_volumes`` bind
    mounted. ``mounts`` are from the configuration, for the status. ``relabels`` are done. ``mounts_in_volumes`` and
    ``directory_in_volume``: the path of a mount or of the working directory is in a volume, which others may change at
    any time.
    """

    spec: oci.Spec
    config_json: bytes
    user: cri_pb2.LinuxContainerUser
    mounts: Sequence[cri_pb2.Mount]
    stop_signal: StopSignal
    volumes: tuple[Volume, ...]
    mapped_volumes: Sequence[MappedVolume]
    relabels: Sequence[Relabel]
    mounts_in_volumes: bool
    directory_in_volume: bool
    private_devices: PrivateDevices | None = None


def build(request: SpecRequest, check: Callable[[], None] = lambda: None) -> ContainerSpec:
    """Check the whole configuration and build its spec: ``draft`` and ``complete`` in one step."""
    return complete(draft(request), check)


def complete(drafted: Draft, check: Callable[[], None] = lambda: None) -> ContainerSpec:
    """Resolve the paths of a draft and encode its spec. Raises the errors of ``draft``. Blocks.

    Missing host paths of mounts are created as folders. With SELinux, volumes and the pod's files are relabelled.
    Nothing else is created. ``check`` is called before that, and may raise.
    """
    with naming_container(drafted.request):
        built = _complete(drafted)
        check()
        drafted.host_paths.make()
        relabel_all(built.relabels, check=check)
    return built


def _complete(drafted: Draft) -> ContainerSpec:
    request, spec, labels = drafted.request, drafted.spec, drafted.labels
    config, process, linux = request.config, spec.process, spec.linux
    described = [node for node in linux.devices if not any(node is other for other in drafted.devices)]
    edits = cdi.edits_for(list(dict.fromkeys(drafted.cdi_devices)), request.cdi_folders, drafted.cdi_asked_by)
    if edits:
        described += _add_described(edits, process, linux)
        spec.hooks = _joined(spec.hooks, cdi.hooks(edits))
    for step in drafted.last_steps:
        step()
    groups = changed_groups(drafted.groups, drafted.volume_mounts, spec.mounts, drafted.asked_by)
    groups = replace(groups, described=cdi.mounts(edits))
    _require_sources(groups)
    settled = settle(request.rootfs, groups)
    refuse_imitations(settled.mounts, groups.folders, settled.names)
    refuse_missing(settled.mounts)
    sees_others = request.namespaces.host_pid or bool(request.namespaces.pid)
    refuse_nested(settled.nested, settled.mounts, sees_others=sees_others)
    for node in linux.devices:
        node.path = settled.paths.destination(node.path, "devices: container_path").path
    own_devices, mounts = prepare(
        request.rootfs,
        linux,
        without_shared_mounts(settled.mounts, groups.defaults),
        described=described,
        folders=groups.folders,
        label=labels.mount,
    )
    if settled.nested:
        mounts = kernel_folders_last(mounts)
    if request.handler.mask is not None:
        mounts += mask_files(linux, settled.paths, request.handler.mask)
    directory = settled_directory(process.cwd, settled.paths)
    host_pid = request.namespaces.host_pid or all(namespace.type != "pid" for namespace in linux.namespaces)
    _refuse_swappable(request, process.cwd, directory, host_pid=host_pid)
    if not directory.exists:  # otherwise its links stay, because they may change while the container runs
        process.cwd = directory.path
    spec.mounts = mounts
    identity = drafted.identity
    used = {mount.source for mount in mounts}
    return ContainerSpec(
        spec=spec,
        config_json=oci.encode(spec),
        user=cri_pb2.LinuxContainerUser(
            uid=identity.uid, gid=identity.gid, supplemental_groups=process.user.additional_gids
        ),
        mounts=config.mounts,
        stop_signal=stop_signal(config, request.image.stop_signal),
        volumes=settled.volumes,
        mapped_volumes=[volume for volume in drafted.mapped_volumes if str(volume.target) in used],
        private_devices=own_devices,
        relabels=(*volumes_to_relabel(config.mounts, drafted.host_paths, labels.mount), *_pod_files(request, labels)),
        mounts_in_volumes=bool(settled.nested),
        directory_in_volume=directory.in_volume or directory.of_kernel,
    )


def _require_sources(groups: MountGroups) -> None:
    """Refuse mounts of plugins whose source is missing, or does not propagate mounts as requested."""
    for what, mount in groups.adjusted:
        if mount.type != "bind":
            continue
        try:
            Path(mount.source).stat()
            if {"shared", "rshared"} & set(mount.options):
                require_propagation(mount.source, shared=True)
            elif {"slave", "rslave"} & set(mount.options):
                require_propagation(mount.source, shared=False)
        except OSError as error:
            raise InvalidArgumentError(
                f"{what} {mount.destination}: its source {mount.source}: {error.strerror}"
            ) from error
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"{what} {mount.destination}: {error.message}") from error


def _joined(first: oci.Hooks | None, second: oci.Hooks | None) -> oci.Hooks | None:
    if first is None or second is None:
        return first or second
    stages = first.__struct_fields__
    return oci.Hooks(**{stage: [*getattr(first, stage), *getattr(second, stage)] for stage in stages})


def _pod_files(request: SpecRequest, labels: SelinuxLabels) -> list[Relabel]:
    files = (request.files.resolv_conf, request.files.hosts, request.files.hostname)
    return [Relabel(str(file.resolve()), labels.mount) for file in files if file is not None and labels.mount]


def _add_described(edits: Sequence[cdi.Edits], process: oci.Process, linux: oci.Linux) -> list[oci.Device]:
    """Add the environment, groups and device nodes of CDI devices.

    The caller adds mounts and hooks. Returns the nodes.
    """
    variables = cdi.environment(edits)
    process.env = [entry for entry in process.env if entry.partition("=")[0] not in variables]
    process.env += [f"{name}={value}" for name, value in variables.items()]
    groups = [group for edit in edits for group in edit.additional_gids if group]
    process.user.additional_gids = list(dict.fromkeys((*process.user.additional_gids, *groups)))
    wanted = [node for edit in edits for node in edit.device_nodes]
    nodes, rules = described_devices(wanted, uid=process.user.uid, gid=process.user.gid)
    paths = {node.path for node in nodes}
    linux.devices = [node for node in linux.devices if node.path not in paths] + nodes
    if linux.resources is not None:
        linux.resources.devices += rules
    return nodes


def _refuse_swappable(request: SpecRequest, given: str, directory: Place, *, host_pid: bool) -> None:
    """Refuse a missing working directory in a volume: some OCI runtimes create it through links that lead out."""
    if directory.in_volume and host_pid and not request.handler.makes_folders_inside:
        raise InvalidArgumentError(
            f"working_dir {given!r} is in a volume, and the container sees the node's processes: runtime handler "
            f"{request.handler.name!r} could be led out of it when it makes the folder: use the volume's own folder, "
            "one outside of it, or crun as handler"
        )
