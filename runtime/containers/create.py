"""Creates containers."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

from host.concurrency.undo import Undo
from host.errors import InvalidArgumentError, NotFoundError, WrongStateError
from images.image import Image
from images.store import ImageStore
from proto.runtime.v1 import cri_pb2
from runtime.cgroups.moves import CgroupMoves
from runtime.cgroups.tree import CgroupTree
from runtime.checkpoints import CheckpointService
from runtime.containers.bundle.bundles import Bundles
from runtime.containers.bundle.monitor_request import monitor_request
from runtime.containers.bundle.pid_namespace import ensure_pid_holder, shares_pod_pids, target_pid_namespace
from runtime.containers.bundle.plugin_settings import set_ignored_settings
from runtime.containers.bundle.rootfs import Rootfs
from runtime.containers.bundle.spec_request import SpecRequests
from runtime.containers.endings.exit import ContainerExit
from runtime.containers.remove import ContainerRemove
from runtime.hooks import Hooks
from runtime.namespaces.user import make_private
from runtime.oci.conmon import Monitors
from runtime.oci.conmon_start import RuntimeRefusedError, StartingMonitor
from runtime.oci.handlers import Handlers
from runtime.oci.oci_runtime import OciRuntime, cannot_run_program, naming, refused_request
from runtime.specgen.builder import ContainerSpec
from runtime.specgen.namespaces import user_mappings
from runtime.state.container import Container, ContainerRecord, ContainerState
from runtime.state.registrar import ContainerRegistrar, ContainerRequest
from runtime.state.sandbox import Sandbox, SandboxState
from runtime.state.state import State
from runtime.state.transitions import of_container

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.checkpoint.restore.restores import Source

NAME_LIMIT = 253

_log = logging.getLogger("podkeel.containers")


class ContainerCreate:
    """Creates containers."""

    def __init__(
        self,
        *,
        catatonit: str,
        state: State,
        names: ContainerRegistrar,
        images: ImageStore,
        rootfs: Rootfs,
        requests: SpecRequests,
        bundles: Bundles,
        handlers: Handlers,
        monitors: Monitors,
        cgroups: CgroupTree,
        moves: CgroupMoves,
        hooks: Hooks,
        exits: ContainerExit,
        removals: ContainerRemove,
        checkpoints: CheckpointService,
    ) -> None:
        self._catatonit = catatonit
        self._state = state
        self._names = names
        self._images = images
        self._rootfs = rootfs
        self._requests = requests
        self._bundles = bundles
        self._handlers = handlers
        self._monitors = monitors
        self._cgroups = cgroups
        self._moves = moves
        self._hooks = hooks
        self._exits = exits
        self._removals = removals
        self._checkpoints = checkpoints

    def adopt(self, container: Container) -> None:
        """Take over a container from the store."""
        self._names.adopt(container)

    async def create(self, sandbox_id: str, config: cri_pb2.ContainerConfig, source: Source | None = None) -> Container:
        """Create a container in a ready sandbox. An identical call joins the running one or gets its container.

        With ``source`` the container is restored from it.

        Raises:
            NotFoundError: the sandbox or the image is missing.
            WrongStateError: the sandbox is not ready.
            InvalidArgumentError: the configuration is invalid.
            AlreadyExistsError: a container with another configuration has this name and attempt.
        """
        sandbox = self._state.get_sandbox(sandbox_id)
        validate_container(config)
        return await self._names.run(ContainerRequest(sandbox, config), lambda: self._make(sandbox, config, source))

    async def _make(self, sandbox: Sandbox, config: cri_pb2.ContainerConfig, source: Source | None) -> Container:
        _require_ready(sandbox)
        log_path = await self._bundles.log_path(sandbox, config)
        async with AsyncExitStack() as held:
            source = source or await self._checkpoints.source(config.image.image, held)
            return await self._make_from(sandbox, config, log_path, source, held)

    async def _make_from(
        self,
        sandbox: Sandbox,
        config: cri_pb2.ContainerConfig,
        log_path: Path | None,
        source: Source | None,
        held: AsyncExitStack,
    ) -> Container:
        """Create a container from its image, or from the checkpoint ``source``. ``held`` closes opened files."""
        image = source.image if source is not None else self._image(config)
        runtime = self._handlers.get(sandbox.record.handler)
        container = self._new_container(sandbox, config, image, runtime, log_path)
        if source is not None:
            container.record.restored_image = image.name
            await self._checkpoints.restores.require(container, runtime)
        self._moves.expect()
        operation = container.begin("CreateContainer")
        checkpoint: Path | None = None
        async with Undo(container.title) as undo:
            undo.push("the container", partial(self._removals.discard, container))
            make_private(container.folder.path, user_mappings(sandbox.namespace_options))
            monitor = self._monitors.prepare(monitor_request(container, runtime))
            undo.push("its monitor", monitor.abandon)
            if source is None and len(self._names) <= self._handlers.parallelism:
                monitor.begin()  # not if more are running: it would wait for a processor, and delay others
            async with operation.stage("reserve"):
                await self._state.add(container)
            async with operation.stage("snapshot"):
                if source is not None:
                    checkpoint = await self._checkpoints.restores.layer(source, container)
                    await self._checkpoints.restores.fill(container, checkpoint)
                await self._rootfs.mount(container, image)
                image_volumes = await self._rootfs.mount_image_volumes(container)
            if shares_pod_pids(container):
                async with operation.stage("pid_namespace"):
                    await ensure_pid_holder(self._state, self._catatonit, self._monitors.cgroup, sandbox)
            undo.push("what plugins know of it", partial(self._hooks.undo_container, container))
            target = held.enter_context(target_pid_namespace(self._state, container))
            request = self._requests.make(container, image, runtime, image_volumes, target_pids=target)
            spec = await self._bundles.make_spec(container, request, operation)
            container.record.mounts = self._rootfs.status_mounts(list(spec.mounts))
            async with container.lock:  # if it ends now, the end is handled after the commit
                async with operation.stage("runtime"), self._handlers.slots:
                    if checkpoint is not None:
                        await self._checkpoints.restores.check(container, runtime, checkpoint, spec.spec)
                    else:
                        await self._create_in_runtime(container, monitor, runtime, spec)
                await self._bundles.verify(container, runtime, spec)
                _require_ready(sandbox)
                async with self._hooks.sync_blocked():
                    await self._hooks.created_container(container, operation)
                    async with operation.stage("commit"):
                        await self._state.move(container, ContainerState.CREATED)
        self._state.publish(cri_pb2.CONTAINER_CREATED_EVENT, container)
        extra = of_container(container, operation)
        _log.info("%s: created from %s", container.title, config.image.image, extra=extra)
        return container

    def _image(self, config: cri_pb2.ContainerConfig) -> Image:
        image = self._images.find(config.image.image)
        if image is None:
            raise NotFoundError(f"image {config.image.image!r} is not on this node: pull it first")
        return image

    def _new_container(
        self,
        sandbox: Sandbox,
        config: cri_pb2.ContainerConfig,
        image: Image,
        runtime: OciRuntime,
        log_path: Path | None,
    ) -> Container:
        container_id = self._state.new_id()
        record = ContainerRecord(
            state=ContainerState.MAKING,
            created_at=time.time_ns(),
            handler=runtime.name,
            boot_id=self._state.boot_id,
            image_id=image.id,
            image_ref=image.repo_digests[0] if image.repo_digests else image.id,
            cgroup=self._cgroups.path(
                sandbox.record.cgroup_parent, container_id, uses_subgroup=runtime.features.is_crun
            ),
            log_path=str(log_path) if log_path else "",
            resources=config.linux.resources.SerializeToString(),
        )
        return self._state.new_container(container_id, sandbox, config, record)

    async def _create_in_runtime(
        self, container: Container, monitor: StartingMonitor, runtime: OciRuntime, spec: ContainerSpec
    ) -> None:
        record = container.record
        try:
            async with self._rootfs.node_mounts.recorded(container.id, spec.spec.mounts, monitor.abandon):
                monitored = await monitor.create()
        except RuntimeRefusedError as error:
            program = spec.spec.process.args[0]
            unrunnable, refused = cannot_run_program(error.message, program), refused_request(error.message)
            if record.changed_by and not unrunnable:
                error.add_context(f"with changes of NRI plugins ({_named(record.changed_by)})")
            self._handlers.failed_actions[runtime.name, "run program" if unrunnable else "create"] += 1
            if not unrunnable and refused:
                raise InvalidArgumentError(f"{runtime.options.path} refuses the container: {error.message}") from error
            if not unrunnable:
                raise
            # Clients expect that a program that cannot be executed fails StartContainer, not CreateContainer.
            record.start_error = naming(program, error.message)
            await monitor.abandon()
            await runtime.delete(container.id)
            return
        container.monitor_descriptor = monitored.monitor_descriptor
        record.monitor = monitored.monitor
        record.init = monitored.init
        self._exits.watch(container)
        await set_ignored_settings(container, runtime, spec.spec.process, self._cgroups)

    async def abort_making(self, sandbox: Sandbox) -> None:
        """Cancel and undo the containers that are being created in a sandbox."""
        await self._names.cancel(lambda identity: identity[0] == sandbox.id)

    async def close(self) -> None:
        """Undo the containers that are being created, when the agent stops."""
        await self._names.drain()


def validate_container(config: cri_pb2.ContainerConfig) -> None:
    """Raise InvalidArgumentError for a configuration that cannot work on any node."""
    name = config.metadata.name
    if not name:
        raise InvalidArgumentError("the container configuration has no metadata with a name: set metadata.name")
    if len(name) > NAME_LIMIT or "/" in name or "\0" in name:
        raise InvalidArgumentError(
            f"container {name[:80]!r}: metadata.name has over {NAME_LIMIT} characters, a slash or a NUL byte"
        )
    if not config.image.image:
        raise InvalidArgumentError(f"container {name!r}: no image is named: set image.image")


def _require_ready(sandbox: Sandbox) -> None:
    if sandbox.record.state is not SandboxState.READY or sandbox.closing:
        raise WrongStateError(f"{sandbox.title} is not ready: create a new sandbox for the container")


def _named(changed_by: Mapping[str, str]) -> str:
    """The plugins and what each changed, because the OCI runtime does not say which change it refuses."""
    plugins = dict.fromkeys(changed_by.values())
    parts = (f"{plugin}: {', '.join(what for what, by in changed_by.items() if by == plugin)}" for plugin in plugins)
    return "; ".join(parts)[:1024]
