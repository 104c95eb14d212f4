"""Checkpoints for the agent's services. The code for them is loaded with the first checkpoint."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

from host.concurrency.threads import acquired, in_long_thread, in_thread
from host.stages import Operation
from images.image import Image
from images.images import Images
from images.oci.reference import parse
from runtime.cgroups.tree import CgroupTree
from runtime.checkpoint.options import CheckpointOptions
from runtime.checkpoint.support import CheckpointSupport
from runtime.layout import Layout
from runtime.oci.conmon import Monitors
from runtime.oci.handlers import Handlers
from runtime.state.state import State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.checkpoint.capture import Tools
    from runtime.checkpoint.documents import ConfigDump
    from runtime.checkpoint.dump import Checkpoints
    from runtime.checkpoint.pod.save import PodCheckpoints
    from runtime.checkpoint.restore.restores import Restores, Source


class CheckpointService:
    """Makes checkpoints of containers. ``support`` knows which runtime handlers can.

    At most ``max_bytes`` are taken from one checkpoint.
    """

    def __init__(
        self,
        options: CheckpointOptions,
        *,
        state: State,
        handlers: Handlers,
        layout: Layout,
        cgroups: CgroupTree,
        images: Images,
        monitors: Monitors,
        max_bytes: int,
    ) -> None:
        self._options = options
        self.max_bytes = max_bytes
        self._state = state
        self._handlers = handlers
        self._layout = layout
        self._cgroups = cgroups
        self._snapshots = images.snapshots
        self._puller = images.puller
        self._images = images
        self._monitors = monitors
        self._restores: Restores | None = None
        self._checkpoints: Checkpoints | None = None
        self._pod_checkpoints: PodCheckpoints | None = None
        self.support = CheckpointSupport(options, handlers)

    async def layer_of(self, image: Image) -> Path | None:
        """The folder of the checkpoint that is all of an image; None for every other image."""
        if len(image.layers) != 1:
            return None
        layer = self._images.layers.path(image.layers[0])
        return layer if await in_thread(_holds_checkpoint, layer) else None

    @property
    def restores(self) -> Restores:
        """The object that makes containers from checkpoints."""
        if self._restores is None:
            from runtime.checkpoint.restore.restores import Restores

            self._restores = Restores(self.support, self._images, self._cgroups, self._monitors, self.layer_of)
        return self._restores

    async def source(self, name: str, held: AsyncExitStack) -> Source | None:
        """The checkpoint in a container's image: an image of a checkpoint, or a path of an archive. Else None.

        Files that it opens are closed with ``held``. Raises NotFoundError, InvalidArgumentError and LimitError for an
        archive that cannot be restored from, and the errors of pulling the container's image.
        """
        if name.startswith("/"):
            return await self._archive(name, held)
        image = self._images.store.find(name)
        layer = await self.layer_of(image) if image is not None else None
        if layer is None:
            return None
        from runtime.checkpoint.restore.restores import Source

        return Source(await self.restores.root_image(layer), layer=layer)

    async def _archive(self, path: str, held: AsyncExitStack) -> Source:
        from runtime.checkpoint import image
        from runtime.checkpoint.long_work import stoppable
        from runtime.checkpoint.restore import archive_file
        from runtime.checkpoint.restore.restores import Source

        opening = partial(archive_file.open_allowed, path, self._options.archive_dirs, self.max_bytes)
        descriptor = await acquired(in_long_thread, opening, os.close)
        held.callback(os.close, descriptor)
        found = await stoppable(partial(image.look_through, descriptor, Path(path)))
        return Source(await self.restores.image_of(found.config), descriptor=descriptor, archive=found)

    def work_folder(self, kind: str) -> Path:
        """A new path for files of a restore. The next start removes files that are left there."""
        return self._layout.checkpoints / f"{kind}-{secrets.token_hex(8)}"

    async def make_image(self, archive: Path, name: str) -> tuple[Image, ConfigDump]:
        """Make an image called ``name`` from a checkpoint archive on the node. Returns it and the container's data.

        Raises NotFoundError if there is no such file, InvalidArgumentError if the archive is no checkpoint for this
        machine or the name is malformed, and LimitError.
        """
        from runtime.checkpoint import image, interrupted
        from runtime.checkpoint.long_work import stoppable

        parse(name)
        folder = self.work_folder("image")
        operation = Operation("ImageFromCheckpoint", f"checkpoint archive {archive}")
        descriptor = await acquired(in_long_thread, partial(image.open_checkpoint, archive), os.close)
        async with AsyncExitStack() as stack:
            stack.callback(os.close, descriptor)
            async with operation.stage("read"):
                found = await stoppable(partial(image.look_through, descriptor, archive))
            stack.push_async_callback(in_long_thread, interrupted.remove, folder)
            async with operation.stage("layout"):
                await stoppable(partial(image.write_layout, found, descriptor, folder))
            (made,) = await self._puller.import_archive(folder, name)
        return made, found.config

    async def checkpoint(self, container_id: str, location: str, seconds: float = 0) -> int:
        """Write a running container to an archive: see ``Checkpoints.checkpoint``."""
        if self._checkpoints is None:
            from runtime.checkpoint.dump import Checkpoints

            self._checkpoints = Checkpoints(self._tools())
        return await self._checkpoints.checkpoint(container_id, location, seconds)

    async def checkpoint_pod(
        self, sandbox_id: str, output: str, container_ids: Sequence[str], options: Mapping[str, str]
    ) -> int:
        """Write running containers of a pod to a folder: see ``PodCheckpoints.checkpoint``."""
        if self._pod_checkpoints is None:
            from runtime.checkpoint.pod.save import PodCheckpoints

            self._pod_checkpoints = PodCheckpoints(self._tools())
        return await self._pod_checkpoints.checkpoint(sandbox_id, output, container_ids, options)

    def _tools(self) -> Tools:
        from runtime.checkpoint.capture import Capture, Tools

        return Tools(
            capture=Capture(self._options, self.support, self._cgroups, self._snapshots),
            support=self.support,
            state=self._state,
            handlers=self._handlers,
            layout=self._layout,
            cgroups=self._cgroups,
        )


def _holds_checkpoint(layer: Path) -> bool:
    return (layer / "config.dump").is_file() and (layer / "checkpoint" / "inventory.img").is_file()
