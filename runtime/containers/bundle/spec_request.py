"""Gathers the data for a container's spec from the node, the pod and the image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from images.image import Image
from proto.runtime.v1 import cri_pb2
from runtime.cgroups.tree import CgroupTree
from runtime.containers.bundle.pid_namespace import pid_namespace
from runtime.containers.bundle.rootfs import Rootfs
from runtime.oci.oci_runtime import OciRuntime
from runtime.options import RuntimeOptions
from runtime.specgen.draft import SpecRequest
from runtime.specgen.facts import HandlerFacts, SandboxFiles
from runtime.specgen.hooks_dir import HooksDir
from runtime.specgen.namespaces import NamespacePaths
from runtime.specgen.node_facts import NodeFacts
from runtime.specgen.security.seccomp import DEFAULT_PROFILE
from runtime.state.container import Container


class SpecRequests:
    """Gathers the data for specs. ``mask`` is the null device with which crun masks files."""

    def __init__(
        self,
        *,
        options: RuntimeOptions,
        facts: NodeFacts,
        cgroups: CgroupTree,
        rootfs: Rootfs,
        hooks_dir: HooksDir,
        mask: Path,
    ) -> None:
        self._options = options
        self._facts = facts
        self._cgroups = cgroups
        self._rootfs = rootfs
        self._hooks_dir = hooks_dir
        self._mask = mask

    def make(
        self,
        container: Container,
        image: Image,
        runtime: OciRuntime,
        image_volumes: Mapping[int, Path],
        *,
        target_pids: str | None = None,
    ) -> SpecRequest:
        """The request for ``runtime.specgen.draft``. The pod's shared PID namespace, if used, must exist.

        ``target_pids`` is the path of the target's PID namespace, if the container has a target.
        """
        sandbox, config = container.sandbox, container.config
        folder = sandbox.folder
        host_ipc = sandbox.namespace_options.ipc == cri_pb2.NODE
        return SpecRequest(
            container_id=container.id,
            config=config,
            sandbox=sandbox.config,
            sandbox_id=sandbox.id,
            image=image.config,
            image_reference=config.image.user_specified_image or config.image.image,
            rootfs=container.folder.rootfs,
            container_folder=self._rootfs.writable(container),
            files=SandboxFiles(
                resolv_conf=folder.resolv_conf,
                hosts=folder.hosts,
                hostname=folder.hostname,
                shm=None if host_ipc else folder.shm,
            ),
            namespaces=_namespace_paths(container, target_pids),
            cgroups_path=self._cgroups.runtime_path(sandbox.record.cgroup_parent, container.id),
            handler=HandlerFacts(
                name=runtime.name,
                recursive_read_only=runtime.features.recursive_read_only_mounts,
                compiled_seccomp=runtime.features.is_crun,
                makes_folders_inside=runtime.features.is_crun,
                mask=self._mask if runtime.features.is_crun else None,
                privileged_without_host_devices=runtime.options.privileged_without_host_devices,
                allowed_annotations=runtime.options.allowed_annotations,
            ),
            node=self._facts,
            image_mounts=image_volumes,
            pids_limit=self._options.pids_limit,
            seccomp_default=Path(runtime.options.seccomp_profile or self._options.seccomp_profile or DEFAULT_PROFILE),
            apparmor_default=self._facts.apparmor_default,
            selinux_level=sandbox.record.selinux_level,
            umask=int(self._options.umask, 8),
            hooks=self._hooks_dir,
        )


def _namespace_paths(container: Container, target_pids: str | None) -> NamespacePaths:
    sandbox = container.sandbox
    folder = sandbox.folder
    own_network = not sandbox.host_network
    pid, host_pid = pid_namespace(container, target_pids)
    return NamespacePaths(
        network=str(folder.pin("net")) if own_network else None,
        uts=str(folder.pin("uts")) if own_network else None,
        ipc=None if sandbox.namespace_options.ipc == cri_pb2.NODE else str(folder.pin("ipc")),
        user=str(folder.pin("user")) if sandbox.user_namespace else None,
        pid=pid,
        host_pid=host_pid,
    )
