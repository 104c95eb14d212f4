"""Makes a draft of the OCI spec from a CreateContainer request. NRI plugins may still change the draft."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from host.errors import InvalidArgumentError, KubeletReasonError, UnsupportedError
from proto.runtime.v1 import cri_pb2
from runtime.specgen import cdi
from runtime.specgen import config as oci
from runtime.specgen.capabilities import capability_sets
from runtime.specgen.devices import devices
from runtime.specgen.facts import HandlerFacts, SandboxFiles
from runtime.specgen.hooks_dir import HookedContainer, HooksDir
from runtime.specgen.identity import Identity, identify
from runtime.specgen.limits.resources import oom_score_adj, resources
from runtime.specgen.mounts.configured import configured_mounts, in_order, root_propagation
from runtime.specgen.mounts.defaults import kernel_mounts, pod_mounts, refuse_linked_targets
from runtime.specgen.mounts.destinations import MountGroups
from runtime.specgen.mounts.host_paths import HostPaths
from runtime.specgen.mounts.idmapped import MappedVolume, mapped_folder
from runtime.specgen.mounts.image_volumes import image_volumes, volume_mounts
from runtime.specgen.namespaces import NamespacePaths, namespaces, user_mappings
from runtime.specgen.node_facts import NodeFacts
from runtime.specgen.process import ImageConfig, command_line, environment, rlimits, working_directory
from runtime.specgen.security.masked_paths import apparmor_profile, masked_and_readonly_paths
from runtime.specgen.security.seccomp import DEFAULT_PROFILE, Filter, seccomp
from runtime.specgen.security.selinux import SelinuxLabels, container_labels

# Annotations that control crun (some name files of the host), and those that only the agent may set.
_RESERVED_ANNOTATIONS = ("run.oci.", "io.kubernetes.cri.")


@dataclass(slots=True, kw_only=True)
class SpecRequest:
    """The input for a spec.

    ``sandbox`` is the configuration from RunPodSandbox. ``rootfs`` is the mounted root file system, whose passwd and
    group files are read. ``container_folder`` has the container's durable files, among them its volumes.
    ``image_mounts`` maps the index of an image mount in ``config.mounts`` to the folder with that image.
    ``pids_limit`` 0 or less means none. ``selinux_level`` is the pod's own level. ``apparmor_default`` is the name of
    the node's loaded profile. ``umask`` is the initial umask of processes. ``hooks`` are the node's own.
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
    hooks: HooksDir | None = None


@dataclass(slots=True, kw_only=True)
class Draft:
    """A spec whose paths are not resolved yet, so that NRI plugins may change it before ``complete``.

    ``spec`` has the requested mounts and devices, without those of CDI devices, whose names are in ``cdi_devices``.
    Mounts or devices that plugins add are resolved and checked like the others. ``asked_by`` maps their destinations,
    ``cdi_asked_by`` the names of CDI devices to the name for errors. ``last_steps`` change or check what needs files of
    the node. They block, and may raise the errors of ``complete``.
    """

    request: SpecRequest
    spec: oci.Spec
    identity: Identity
    labels: SelinuxLabels
    host_paths: HostPaths
    groups: MountGroups
    volume_mounts: Sequence[oci.Mount]
    devices: Sequence[oci.Device]
    mapped_volumes: Sequence[MappedVolume]
    cdi_devices: list[str]
    asked_by: dict[str, str] = field(default_factory=dict)
    cdi_asked_by: dict[str, str] = field(default_factory=dict)
    last_steps: list[Callable[[], None]] = field(default_factory=list)


def draft(request: SpecRequest) -> Draft:
    """Check the configuration and build its spec, except for what plugins may still change. Files are only read.

    Blocks: call it in a thread. Raises InvalidArgumentError, UnsupportedError if the node or the handler lacks
    something, and KubeletReasonError for the reasons that kubelet knows. Each names the container, the field and the
    remedy.
    """
    with naming_container(request):
        return _draft(request)


@contextmanager
def naming_container(request: SpecRequest) -> Iterator[None]:
    """Put the container's name before the message of an error."""
    pod = request.sandbox.metadata
    subject = f"container {request.config.metadata.name!r} of pod {pod.namespace}/{pod.name}"
    try:
        yield
    except KubeletReasonError as error:
        raise KubeletReasonError(error.reason, f"{subject}: {error.args[0]}") from error
    except (InvalidArgumentError, UnsupportedError) as error:
        raise type(error)(f"{subject}: {error.message}") from error


def _draft(request: SpecRequest) -> Draft:
    config = request.config
    _refuse_impossible(request)
    refuse_linked_targets(request.rootfs)
    identity = identify(config.linux.security_context, request.image.user, request.rootfs)
    labels = container_labels(config, request.sandbox, request.node, level=request.selinux_level)
    process, permitted = _process(request, identity, labels)
    filtered = seccomp(config.linux.security_context, permitted, request.node, default_profile=request.seccomp_default)
    linux = _linux(request, filtered, labels)
    linux.rootfs_propagation = root_propagation(config.mounts)
    host_paths = HostPaths()
    configured, mapped_volumes = configured_mounts(
        config.mounts,
        request.image_mounts,
        host_paths,
        request.handler,
        request.node,
        mapped_folder=mapped_folder(request.rootfs),
    )
    groups = MountGroups(
        defaults=_default_mounts(request, linux.gid_mappings),
        volumes=image_volumes(request.image.volumes or (), request.rootfs, request.container_folder, labels.mount),
        configured=configured,
        folders={str(volume.target): volume.source for volume in mapped_volumes},
    )
    of_volumes = volume_mounts(groups.volumes)
    spec = oci.Spec(
        oci_version=oci.VERSION,
        process=process,
        root=oci.Root(path=str(request.rootfs), readonly=config.linux.security_context.readonly_rootfs),
        mounts=in_order(groups.defaults, [*of_volumes, *configured]),
        linux=linux,
        annotations=_annotations(request, filtered),
    )
    if request.hooks is not None:
        annotations = {**config.annotations, **request.sandbox.annotations}
        command = next(iter(process.args), "")
        request.hooks.add_to(spec, HookedContainer(annotations, command, bool(config.mounts)))
    return Draft(
        request=request,
        spec=spec,
        identity=identity,
        labels=labels,
        host_paths=host_paths,
        groups=groups,
        volume_mounts=of_volumes,
        devices=tuple(linux.devices),
        mapped_volumes=mapped_volumes,
        cdi_devices=cdi.requested(config),
    )


def _refuse_impossible(request: SpecRequest) -> None:
    if request.config.linux.security_context.privileged and not request.sandbox.linux.security_context.privileged:
        raise InvalidArgumentError(
            "a privileged container cannot run in a pod that is not privileged: make the pod sandbox privileged"
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
    """Annotations for hooks and sandboxed runtimes with the usual names, and those that the handler allows."""
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
    # A crun that does not know this annotation uses the profile, which is in the spec too.
    if filtered is not None and request.handler.compiled_seccomp and filtered.bpf is not None:
        annotations["run.oci.seccomp_bpf_data"] = filtered.bpf
    if ":" in request.cgroups_path and request.node.cgroup_version == 2:
        annotations |= _scope_annotations(request.pids_limit)
    return annotations


def _scope_annotations(pids_limit: int) -> dict[str, str]:
    """Annotations that give the systemd scope of the OCI runtime exactly the configured limits.

    crun writes limits that systemd does not know. In the scope itself the next daemon-reload would remove them, so they
    are set in a cgroup below it. Without an annotation, the scope's limit of tasks is systemd's default (15% of the
    machine's).
    """
    tasks = pids_limit if pids_limit > 0 else 2**64 - 1
    return {
        "run.oci.systemd.subgroup": oci.SCOPE_SUBGROUP,
        "org.systemd.property.TasksMax": f"uint64 {tasks}",
    }
