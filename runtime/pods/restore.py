"""RestorePod: creates a pod whose containers continue from a checkpoint (KEP-5823)."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial

from host import processes
from host.concurrency.tasks import uninterrupted
from host.concurrency.threads import acquired, in_fresh_thread, in_thread
from host.concurrency.undo import Undo
from host.errors import InvalidArgumentError, NotFoundError
from host.stages import Operation
from images.image import Image
from images.store import ImageStore
from proto.runtime.v1 import cri_pb2
from runtime.checkpoints import CheckpointService
from runtime.containers.create import ContainerCreate, validate_container
from runtime.oci.handlers import Handlers
from runtime.pods.remove import PodRemove
from runtime.pods.run import PodRun
from runtime.state.container import Container
from runtime.state.sandbox import Sandbox
from runtime.state.sandbox_checks import validate_sandbox
from runtime.state.state import State
from runtime.state.transitions import of_sandbox

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.checkpoint.pod.staging import Staged

_log = logging.getLogger("podkeel.pods")


@dataclass(slots=True)
class _Made:
    """What a call has created so far. The sandbox's record has ``token`` until the pod is complete."""

    token: str
    containers: list[Container] = field(default_factory=list)


class PodRestore:
    """Creates pods from checkpoints."""

    def __init__(
        self,
        *,
        state: State,
        handlers: Handlers,
        images: ImageStore,
        checkpoints: CheckpointService,
        pods: PodRun,
        removals: PodRemove,
        containers: ContainerCreate,
    ) -> None:
        self._state = state
        self._handlers = handlers
        self._images = images
        self._checkpoints = checkpoints
        self._pods = pods
        self._removals = removals
        self._containers = containers

    async def restore(
        self,
        path: str,
        config: cri_pb2.PodSandboxConfig,
        handler: str,
        options: Mapping[str, str],
        configs: Sequence[cri_pb2.ContainerConfig],
    ) -> tuple[Sandbox, list[Container]]:
        """Create a ready pod with a created container for each one in the checkpoint. StartContainer continues each.

        After an error everything is removed.

        Raises:
            NotFoundError: the folder, the runtime handler or an image is missing.
            InvalidArgumentError: a configuration is invalid or contradicts the checkpoint, or the latter is broken.
            UnsupportedError: the runtime handler cannot restore containers here.
            AlreadyExistsError: the identity of the pod is taken.
            LimitError: the checkpoint is too large.
        """
        _check(config, options, configs)
        runtime = self._handlers.get(handler)
        title = f"sandbox {config.metadata.namespace}/{config.metadata.name}"
        await self._checkpoints.restores.require_handler(runtime, title)
        operation = Operation("RestorePod", title)
        made = _Made(secrets.token_hex(8))
        async with AsyncExitStack() as held:
            async with operation.stage("read"):
                staged = await self._read(path, title, configs, held)
                images = {each.metadata.name: self._image(staged, each) for each in configs}
            async with Undo(title) as undo:
                undo.push("the restored pod", partial(self._discard, made))
                undo.push("its files", staged.remove)
                async with operation.stage("files"):
                    await staged.take()
                async with operation.stage("sandbox"):
                    sandbox = await self._pods.run(config, handler, restoring=made.token)
                sandbox.operations.append(operation)
                async with operation.stage("memory"):
                    await self._checkpoints.restores.fill_shared_memory(sandbox, staged.shared_memory)
                async with operation.stage("containers"):
                    for each in configs:
                        source = staged.source(each.metadata.name, images[each.metadata.name])
                        made.containers.append(await self._containers.create(sandbox.id, each, source))
                    await self._keep_pids(sandbox, await in_thread(staged.highest_pid))
                async with operation.stage("commit"):
                    sandbox.record.restoring = ""
                    try:
                        await self._state.save(sandbox)
                    except BaseException:
                        sandbox.record.restoring = made.token
                        raise
        # The pod is complete: the remaining work is short.
        await uninterrupted(staged.remove())
        words = "%s: restored from %s: %d containers"
        _log.info(words, sandbox.title, path, len(configs), extra=of_sandbox(sandbox, operation))
        return sandbox, made.containers

    async def _read(
        self, path: str, title: str, configs: Sequence[cri_pb2.ContainerConfig], held: AsyncExitStack
    ) -> Staged:
        """Open the checkpoint and compare it with the configurations. ``held`` closes it."""
        from runtime.checkpoint.pod.place import open_folder
        from runtime.checkpoint.pod.source import PodSource, compare
        from runtime.checkpoint.pod.staging import Staged

        opening = partial(open_folder, path, f"{title}: checkpoint_path")
        descriptor = await acquired(in_fresh_thread, opening, os.close)
        held.callback(os.close, descriptor)
        source = PodSource(descriptor, f"{title}: checkpoint {path!r}", self._checkpoints.max_bytes)
        document = await in_fresh_thread(source.read)
        compare(document, configs, title)
        return Staged(source, document, self._checkpoints.work_folder("restore"))

    def _image(self, staged: Staged, config: cri_pb2.ContainerConfig) -> Image:
        """The image of a configuration. It must be the checkpointed one."""
        name = config.metadata.name
        image = self._images.find(config.image.image)
        if image is None:
            raise NotFoundError(f"image {config.image.image!r} is not on this node: pull it first")
        if image.id != staged.saved(name).image_id:
            raise InvalidArgumentError(
                f"container {name!r}: image {config.image.image!r} is {image.id}, and that of the checkpoint is "
                f"{staged.saved(name).image_id[:100]!r}: they must be the same"
            )
        return image

    async def _keep_pids(self, sandbox: Sandbox, highest: int) -> None:
        """Set the last pid of a PID namespace, so that new processes get pids above the restored ones."""
        if sandbox.record.pid_holder is None or not highest:
            return
        pin = sandbox.folder.pin("pid")
        write = f"echo {highest:d} > /proc/sys/kernel/ns_last_pid"
        await processes.run(["nsenter", f"--pid={pin}", "/bin/sh", "-c", write], timeout=30)

    async def _discard(self, made: _Made) -> None:
        """Remove the sandbox of a failed call with its containers."""
        for sandbox in [each for each in self._state.sandboxes if each.record.restoring == made.token]:
            await self._removals.remove(sandbox.id)


def _check(
    config: cri_pb2.PodSandboxConfig, options: Mapping[str, str], configs: Sequence[cri_pb2.ContainerConfig]
) -> None:
    """Raise InvalidArgumentError for a request that is invalid with any checkpoint."""
    from runtime.checkpoint.pod.options import check_restore_options

    check_restore_options(options)
    validate_sandbox(config)
    title = f"sandbox {config.metadata.namespace}/{config.metadata.name}"
    if not configs:
        raise InvalidArgumentError(f"{title}: container_configs is empty: give one for each container")
    names = set()
    for each in configs:
        validate_container(each)
        if each.metadata.name in names:
            raise InvalidArgumentError(f"{title}: container_configs names {each.metadata.name!r} twice")
        names.add(each.metadata.name)
        modes = each.linux.security_context.namespace_options
        if each.tty or modes.pid in (cri_pb2.NODE, cri_pb2.TARGET):
            what = "a terminal" if each.tty else "a PID namespace that is not its pod's"
            raise InvalidArgumentError(f"{title}: container {each.metadata.name!r} has {what}: it cannot be restored")
    modes = config.linux.security_context.namespace_options
    for what, there in (
        ("the network of the node", modes.network == cri_pb2.NODE),
        ("the PID namespace of the node", modes.pid == cri_pb2.NODE),
        ("the IPC namespace of the node", modes.ipc == cri_pb2.NODE),
        ("a user namespace", modes.HasField("userns_options") and modes.userns_options.mode == cri_pb2.POD),
    ):
        if there:
            raise InvalidArgumentError(f"{title} uses {what}: such a pod cannot be restored")
