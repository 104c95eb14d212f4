"""From one CreateContainer request to its OCI spec: everything is checked first, then missing host folders are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from host.errors import InvalidArgumentError, KubeletReasonError, UnsupportedError
from proto.runtime.v1 import cri_pb2
from runtime.spec import cdi, oci
from runtime.spec.capabilities import capability_sets
from runtime.spec.container_paths import Place
from runtime.spec.default_mounts import kernel_mounts, pod_mounts, refuse_linked_targets
from runtime.spec.destinations import MountGroups, settle
from runtime.spec.devices import described_devices, devices
from runtime.spec.facts import HandlerFacts, SandboxFiles
from runtime.spec.host_paths import HostPaths
from runtime.spec.identity import Identity, identify
from runtime.spec.kernel_places import refuse_imitations
from runtime.spec.mapped_volumes import MappedVolume, mapped_folder
from runtime.spec.mounts import configured_mounts, root_propagation
from runtime.spec.namespaces import NamespacePaths, namespaces, user_mappings
from runtime.spec.node import NodeFacts
from runtime.spec.private_devices import PrivateDevices, prepare
from runtime.spec.process import ImageConfig, command_line, environment, settled_directory, working_directory
from runtime.spec.relabel import relabel_all
from runtime.spec.resources import oom_score_adj, resources
from runtime.spec.rlimits import rlimits
from runtime.spec.seccomp import DEFAULT_PROFILE, Filter, seccomp
from runtime.spec.security import apparmor_profile, masked_and_readonly_paths
from runtime.spec.selinux import Relabel, SelinuxLabels, container_labels, volumes_to_relabel
from runtime.spec.signals import StopSignal, stop_signal
from runtime.spec.volumes import Volume, image_volumes

# Annotations that are orders to crun (of files of the host among them), and what only the agent says: not for users.
_RESERVED_ANNOTATIONS = ("run.oci.", "io.kubernetes.cri.")


@dataclass(slots=True, kw_only=True)
class SpecRequest:
    """What a spec is made from.

    ``sandbox`` is the configuration RunPodSandbox was given. ``rootfs`` is the mounted root filesystem, whose passwd
    and group are read. ``container_folder`` holds the container's durable files, among them its volumes.
    ``image_mounts`` maps the index of an image mount in ``config.mounts`` to the folder where that image is prepared.
    ``pids_limit`` 0 or less means none. ``selinux_level`` is the pod's own level. ``apparmor_default`` is the name of
    the node's loaded profile. ``umask`` is what processes begin with.
    """

    container_id: str
    config: cri_pb2.ContainerConfig
    sandbox: cri_pb2.PodSandboxConfig
    image: ImageConfig
    image_reference: str
    rootfs: Path
    container_folder: Path
    files: SandboxFiles
    namespaces: NamespacePaths
    cgroups_path: str
    handler: HandlerFacts
    node: NodeFacts
    sandbox_id: str = ""
    image_mounts: Mapping[int, Path] = field(default_factory=dict)
    pids_limit: int = 0
    rlimits: Sequence[oci.Rlimit] = ()
    cdi_folders: Sequence[Path] = cdi.FOLDERS
    seccomp_default: Path = DEFAULT_PROFILE
    apparmor_default: str = ""
    selinux_level: str = ""
    umask: int = 0o022


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerSpec:
    """A built spec, and what of it the container's status and its stop need.

    ``volumes`` are still to be made, with ``volumes.make_volumes``, ``private_devices`` too, and ``mapped_volumes`` to
    be bound. ``mounts`` are the configuration's, as status shows them. ``relabels`` are done. ``mounts_in_volumes`` and
    ``directory_in_volume``: the way of a mount or of the working directory leads through a volume, which others may
    change at any time.
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
    """Check the whole configuration and build its spec; reads files, so call it in a thread.

    Raises InvalidArgumentError (UnsupportedError where the node or the handler lacks something, KubeletReasonError for
    the reasons kubelet knows) naming the container, the field and the remedy, before anything is made. The only things
    made are missing host paths of mounts, as folders; where SELinux is on, volumes and the pod's files are relabelled.
    ``check`` is called before that, and may raise.
    """
    host_paths = HostPaths()
    try:
        built = _build(request, host_paths)
        check()
        host_paths.make()
        relabel_all(built.relabels, check=check)
    except KubeletReasonError as error:
        raise KubeletReasonError(error.reason, f"{_subject(request)}: {error.args[0]}") from error
    except (InvalidArgumentError, UnsupportedError) as error:
        raise type(error)(f"{_subject(request)}: {error.message}") from error
    return built


def _subject(request: SpecRequest) -> str:
    pod = request.sandbox.metadata
    return f"container {request.config.metadata.name!r} of pod {pod.namespace}/{pod.name}"


def _build(request: SpecRequest, host_paths: HostPaths) -> ContainerSpec:
    config = request.config
    _refuse_impossible(request)
    refuse_linked_targets(request.rootfs)
    identity = identify(config.linux.security_context, request.image.user, request.rootfs)
    labels = container_labels(config, request.sandbox, request.node, level=request.selinux_level)
    process, permitted = _process(request, identity, labels)
    filtered = seccomp(config.linux.security_context, permitted, request.node, default_profile=request.seccomp_default)
    linux = _linux(request, filtered, labels)
    linux.rootfs_propagation = root_propagation(config.mounts)
    configured, mapped_volumes = configured_mounts(
        config.mounts,
        request.image_mounts,
        host_paths,
        request.handler,
        request.node,
        mapped_folder=mapped_folder(request.rootfs),
    )
    edits = cdi.edits_for(cdi.requested(config), request.cdi_folders)
    described: list[oci.Device] = []
    if edits:
        described = _add_described(edits, process, linux)
    groups = MountGroups(
        defaults=_default_mounts(request, linux.gid_mappings),
        volumes=image_volumes(request.image.volumes or (), request.rootfs, request.container_folder, labels.mount),
        configured=configured,
        described=cdi.mounts(edits),
        folders={str(volume.target): volume.source for volume in mapped_volumes},
    )
    settled = settle(request.rootfs, groups)
    refuse_imitations(settled.mounts, groups.folders)
    for node in linux.devices:
        node.path = settled.paths.destination(node.path, "devices: container_path").path
    own_devices, mounts = prepare(
        request.rootfs, linux, settled.mounts, described=described, folders=groups.folders, label=labels.mount
    )
    directory = settled_directory(process.cwd, settled.paths)
    _refuse_swappable(request, process.cwd, directory)
    if not directory.exists:  # else its links stay, as they may change while the container runs
        process.cwd = directory.path
    readonly_root = config.linux.security_context.readonly_rootfs
    spec = oci.Spec(
        oci_version=oci.VERSION,
        process=process,
        root=oci.Root(path=str(request.rootfs), readonly=readonly_root),
        mounts=mounts,
        linux=linux,
        annotations=_annotations(request, filtered),
        hooks=cdi.hooks(edits) if edits else None,
    )
    return ContainerSpec(
        spec=spec,
        config_json=oci.encode(spec),
        user=cri_pb2.LinuxContainerUser(
            uid=identity.uid, gid=identity.gid, supplemental_groups=process.user.additional_gids
        ),
        mounts=config.mounts,
        stop_signal=stop_signal(config, request.image.stop_signal),
        volumes=settled.volumes,
        mapped_volumes=[volume for volume in mapped_volumes if any(str(volume.target) == m.source for m in mounts)],
        private_devices=own_devices,
        relabels=(*volumes_to_relabel(config.mounts, host_paths, labels.mount), *_pod_files(request, labels)),
        mounts_in_volumes=settled.through_volumes,
        directory_in_volume=directory.in_volume or directory.of_kernel,
    )


def _pod_files(request: SpecRequest, labels: SelinuxLabels) -> list[Relabel]:
    files = (request.files.resolv_conf, request.files.hosts, request.files.hostname)
    return [Relabel(str(file.resolve()), labels.mount) for file in files if file is not None and labels.mount]


def _add_described(edits: Sequence[cdi.Edits], process: oci.Process, linux: oci.Linux) -> list[oci.Device]:
    """Environment, groups and device nodes of the CDI devices; mounts and hooks are the caller's. Returns the nodes."""
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


def _refuse_impossible(request: SpecRequest) -> None:
    if request.config.linux.security_context.privileged and not request.sandbox.linux.security_context.privileged:
        raise InvalidArgumentError(
            "a privileged container cannot run in a pod that is not privileged: make the pod sandbox privileged"
        )


def _refuse_swappable(request: SpecRequest, given: str, directory: Place) -> None:
    """Not every OCI runtime makes a missing working directory without following links; with host PID they lead out."""
    if directory.in_volume and request.namespaces.host_pid and not request.handler.makes_folders_inside:
        raise InvalidArgumentError(
            f"working_dir {given!r} lies in a volume, and the container sees the node's processes: runtime handler "
            f"{request.handler.name!r} could be led out of it when it makes the folder: use the volume's own folder, "
            "one outside of it, or crun as handler"
        )


def _process(request: SpecRequest, identity: Identity, labels: SelinuxLabels) -> tuple[oci.Process, frozenset[str]]:
    config, node = request.config, request.node
    context = config.linux.security_context
    capabilities, permitted = capability_sets(context, node.capabilities)
    process = oci.Process(
        terminal=config.tty,
        user=oci.User(
            uid=identity.uid,
            gid=identity.gid,
            umask=request.umask,
            additional_gids=list(identity.supplemental_groups),
        ),
        args=command_line(config, request.image),
        env=environment(config, request.image, hostname=request.sandbox.hostname or node.hostname, home=identity.home),
        cwd=working_directory(config, request.image),
        capabilities=capabilities,
        rlimits=rlimits(request.rlimits, node),
        no_new_privileges=context.no_new_privs,
        apparmor_profile=apparmor_profile(context, node, default=request.apparmor_default),
        selinux_label=labels.process,
        oom_score_adj=oom_score_adj(config.linux.resources, node),
    )
    return process, permitted


def _linux(request: SpecRequest, filtered: Filter | None, labels: SelinuxLabels) -> oci.Linux:
    config, node, paths = request.config, request.node, request.namespaces
    context = config.linux.security_context
    all_devices = context.privileged and not request.handler.privileged_without_host_devices
    nodes, rules = devices(config.devices, all_of_host=all_devices)
    limits = resources(config.linux.resources, node, pids_limit=request.pids_limit)
    limits.devices = rules
    masked, readonly = masked_and_readonly_paths(config)
    mappings = user_mappings(request.sandbox.linux.security_context.namespace_options) if paths.user else None
    return oci.Linux(
        namespaces=namespaces(
            paths,
            own_cgroup_namespace=node.cgroup_version == 2 and (not context.privileged or paths.user is not None),
        ),
        uid_mappings=mappings[0] if mappings else [],
        gid_mappings=mappings[1] if mappings else [],
        devices=nodes,
        cgroups_path=request.cgroups_path,
        resources=limits,
        seccomp=filtered.encoded if filtered else None,
        masked_paths=masked,
        readonly_paths=readonly,
        mount_label=labels.mount,
    )


def _default_mounts(request: SpecRequest, gid_mappings: list[oci.IDMapping]) -> list[oci.Mount]:
    context = request.config.linux.security_context
    return [
        *kernel_mounts(request.namespaces, privileged=context.privileged, gid_mappings=gid_mappings),
        *pod_mounts(request.files, own_ipc=request.namespaces.ipc is not None, readonly_root=context.readonly_rootfs),
    ]


def _annotations(request: SpecRequest, filtered: Filter | None) -> dict[str, str]:
    """What hooks and sandboxed runtimes read, in the names the field shares, and what the handler lets through."""
    pod = request.sandbox.metadata
    annotations = {
        key: value
        for given in (request.sandbox.annotations, request.config.annotations)
        for key, value in given.items()
        if not key.startswith(_RESERVED_ANNOTATIONS)
        and any(fnmatchcase(key, pattern) for pattern in request.handler.allowed_annotations)
    }
    prefix = "io.kubernetes.cri."
    annotations |= {
        prefix + "container-type": "container",
        prefix + "container-name": request.config.metadata.name,
        prefix + "image-name": request.image_reference,
        prefix + "sandbox-id": request.sandbox_id,
        prefix + "sandbox-name": pod.name,
        prefix + "sandbox-namespace": pod.namespace,
        prefix + "sandbox-uid": pod.uid,
    }
    # A crun that no longer knows this annotation goes by the profile, which is in the spec as well.
    if filtered is not None and request.handler.compiled_seccomp and filtered.bpf is not None:
        annotations["run.oci.seccomp_bpf_data"] = filtered.bpf
    if ":" in request.cgroups_path and request.node.cgroup_version == 2:
        annotations |= _scope_annotations(request.pids_limit)
    return annotations


def _scope_annotations(pids_limit: int) -> dict[str, str]:
    """What makes the scope that the OCI runtime asks systemd for hold what was configured, and nothing else.

    crun writes limits that systemd does not know: in the scope itself they would be gone after the next daemon-reload,
    so they go to a group below it. The scope's limit of tasks is systemd's default (15% of the machine's) otherwise.
    """
    tasks = pids_limit if pids_limit > 0 else 2**64 - 1
    return {
        "run.oci.systemd.subgroup": oci.SCOPE_SUBGROUP,
        "org.systemd.property.TasksMax": f"uint64 {tasks}",
    }
