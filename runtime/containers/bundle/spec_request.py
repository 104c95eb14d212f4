"""The facts for a container's spec, gathered from the node, the pod and the image."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from host.concurrency.threads import in_fresh_thread, in_thread
from host.concurrency.undo import Undo
from host.errors import InvalidArgumentError, WrongStateError
from host.processes import open_namespace
from images.image import Image
from proto.runtime.v1 import cri_pb2
from runtime.cgroups.tree import CgroupTree
from runtime.containers.bundle.rootfs import Rootfs
from runtime.namespaces.pid import end_holder, pin_holder, start_holder, start_holder_in_user_namespace
from runtime.oci.oci_runtime import OciRuntime
from runtime.options import RuntimeOptions
from runtime.specgen.draft import SpecRequest
from runtime.specgen.facts import HandlerFacts, SandboxFiles
from runtime.specgen.hooks_dir import HooksDir
from runtime.specgen.namespaces import NamespacePaths
from runtime.specgen.node_facts import NodeFacts
from runtime.specgen.security.seccomp import DEFAULT_PROFILE
from runtime.state.container import Container, ContainerState
from runtime.state.sandbox import Sandbox
from runtime.state.state import State


class SpecRequests:
    """Gathers what specs are built from. ``mask`` is the null device behind which crun hides files."""

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
        """The request for ``runtime.specgen.draft``; the pod's shared PID namespace, if used, exists already.

        ``target_pids`` is the path of the target's PID namespace, for a container that has one.
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


def shares_pod_pids(container: Container) -> bool:
    """Whether a container joins the PID namespace that its pod shares."""
    mode = container.config.linux.security_context.namespace_options.pid
    return mode == cri_pb2.POD and container.sandbox.namespace_options.pid != cri_pb2.NODE


async def ensure_pid_holder(state: State, catatonit: str, sandbox: Sandbox) -> None:
    """Make the PID namespace that the pod's containers share, unless it is there already."""
    async with sandbox.holder_lock:
        if sandbox.record.pid_holder is not None:
            return
        folder = sandbox.folder
        async with Undo(sandbox.title) as undo:
            undo.push("the init of its PID namespace", partial(in_thread, end_holder, None, folder, sandbox.id))
            start = start_holder_in_user_namespace if sandbox.user_namespace else start_holder
            pid = await in_fresh_thread(start, folder, catatonit, sandbox.id)
            sandbox.record.pid_holder = await in_thread(pin_holder, folder, pid)
            undo.push("its record", partial(setattr, sandbox.record, "pid_holder", None))
            await state.save(sandbox)


def _namespace_paths(container: Container, target_pids: str | None) -> NamespacePaths:
    sandbox = container.sandbox
    folder = sandbox.folder
    own_network = not sandbox.host_network
    pid, host_pid = _pid_namespace(container, target_pids)
    return NamespacePaths(
        network=str(folder.pin("net")) if own_network else None,
        uts=str(folder.pin("uts")) if own_network else None,
        ipc=None if sandbox.namespace_options.ipc == cri_pb2.NODE else str(folder.pin("ipc")),
        user=str(folder.pin("user")) if sandbox.user_namespace else None,
        pid=pid,
        host_pid=host_pid,
    )


def _pid_namespace(container: Container, target_pids: str | None) -> tuple[str | None, bool]:
    """Path of the PID namespace to join (None: a new one), and whether it is the node's."""
    sandbox = container.sandbox
    options = container.config.linux.security_context.namespace_options
    if options.pid == cri_pb2.NODE:
        return None, True
    if options.pid in (cri_pb2.CONTAINER, cri_pb2.TARGET):
        return target_pids, False
    if sandbox.namespace_options.pid == cri_pb2.NODE:
        return None, True
    return str(sandbox.folder.pin("pid")), False


@contextmanager
def target_pid_namespace(state: State, container: Container) -> Iterator[str | None]:
    """The path, good for the block, of the PID namespace of the container that ``container`` targets; None without.

    It is one of a descriptor of the agent's: by a path of the target's process the OCI runtime would join the namespace
    of the process that has that pid by then. Raises InvalidArgumentError for a target that is no container of the pod,
    WrongStateError for one that does not run.
    """
    options = container.config.linux.security_context.namespace_options
    if options.pid != cri_pb2.TARGET:
        yield None
        return
    target = state.containers.find(options.target_id) if options.target_id else None
    if target is None or target.sandbox.id != container.sandbox.id or not target.visible:
        raise InvalidArgumentError(
            f"{container.title}: target_id {options.target_id!r} is not a container of its pod: name one of them"
        )
    init = target.record.init if target.record.state is ContainerState.RUNNING else None
    descriptor = open_namespace(init.pid, init.started, "pid") if init is not None else None
    if descriptor is None:
        raise WrongStateError(f"{container.title}: its target {target.title} does not run, so has no PID namespace")
    try:
        yield f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)
