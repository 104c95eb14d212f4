"""Creates a container from a checkpoint, and continues its processes."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import os
import stat
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from host.concurrency.tasks import ended, wait_out
from host.concurrency.threads import acquired, in_image_thread, in_long_thread, in_thread
from host.errors import InvalidArgumentError, PodkeelError, UnsupportedError, WrongStateError
from host.files.file_tree import open_below
from host.files.removal import remove_tree
from images.image import Image
from images.images import Images
from images.oci.manifests import Descriptor
from proto.runtime.v1 import cri_pb2
from runtime.cgroups.tree import CgroupTree
from runtime.checkpoint import criu_log, documents
from runtime.checkpoint.documents import ConfigDump
from runtime.checkpoint.image import Archive
from runtime.checkpoint.long_work import stoppable
from runtime.checkpoint.restore import archive_file, source, tar_files
from runtime.checkpoint.restore.cgroup_limits import set_limits
from runtime.checkpoint.restore.rights import check_rights
from runtime.checkpoint.support import CheckpointSupport
from runtime.oci.conmon import MonitorRequest, Monitors, Restoring
from runtime.oci.conmon_start import RuntimeRefusedError
from runtime.oci.oci_runtime import OciRuntime
from runtime.specgen import config
from runtime.state.container import Container
from runtime.state.sandbox import Sandbox

_log = logging.getLogger("podkeel.checkpoint")

_PIECE = 1 << 20
_UNPACKED = "archive"
_SECONDS = 300.0  # for a restore, and more for its memory
_SLOWEST = 5 << 20  # bytes a second
_MAX_LOG_BYTES = 64 << 20
_LOOK_SECONDS = 0.5
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Source:
    """The source of a restore: a layer on this node or an open archive, and the image that the container had."""

    image: Image
    layer: Path | None = None
    descriptor: int = -1
    archive: Archive | None = None


class Restores:
    """Creates containers from images with a checkpoint."""

    def __init__(
        self,
        support: CheckpointSupport,
        images: Images,
        cgroups: CgroupTree,
        monitors: Monitors,
        layer_of: Callable[[Image], Awaitable[Path | None]],
    ) -> None:
        self._layer_of = layer_of
        self._support = support
        self._images = images
        self._cgroups = cgroups
        self._monitors = monitors
        self._dropping: set[asyncio.Task[None]] = set()

    async def root_image(self, layer: Path) -> Image:
        """The image that the checkpointed container was made from. It is pulled if it is missing.

        Raises InvalidArgumentError if the checkpoint names none, and the errors of a pull.
        """
        return await self.image_of(await in_thread(source.read_config, layer))

    async def image_of(self, dump: ConfigDump) -> Image:
        """As ``root_image``, for the image named in a checkpoint's data about its container."""
        for name in (dump.rootfs_image, dump.rootfs_image_ref, dump.rootfs_image_name):
            with suppress(PodkeelError):
                image = self._images.store.find(name) if name else None
                if image is not None and await self._layer_of(image) is None:
                    return image
        if not dump.rootfs_image_name:
            raise InvalidArgumentError("the checkpoint does not name the image of its container")
        image = await self._images.puller.pull(dump.rootfs_image_name)
        if await self._layer_of(image) is not None:
            raise InvalidArgumentError("the checkpoint names another checkpoint as the image of its container")
        return image

    async def require_handler(self, runtime: OciRuntime, title: str) -> None:
        """Raise UnsupportedError if the runtime handler cannot restore ``title`` here."""
        await self._support.require(runtime, runtime.name)
        if not runtime.features.is_crun:
            raise UnsupportedError(f"{title}: runtime handler {runtime.name!r} does not restore containers: use crun")
        if self._cgroups.driver == "systemd":
            raise UnsupportedError(f"{title}: containers are not restored with the systemd cgroup driver: use cgroupfs")

    async def require(self, container: Container, runtime: OciRuntime) -> None:
        """Raise UnsupportedError if the container cannot be restored here."""
        await self.require_handler(runtime, container.title)
        why = ""
        if container.sandbox.user_namespace:
            why = "containers in user namespaces are not restored"
        elif container.config.tty:
            why = "containers with a terminal are not restored"
        if why:
            raise UnsupportedError(f"{container.title}: {why}")

    async def layer(self, source_of: Source, container: Container) -> Path:
        """The folder with the checkpoint. For an archive it is created in the container's own folder."""
        if source_of.archive is None:
            assert source_of.layer is not None
            return source_of.layer
        folder = self._images.snapshots.upper(container.id).parent
        await in_thread(partial(folder.mkdir, mode=0o700, exist_ok=True))
        members = source_of.archive.members
        await stoppable(partial(archive_file.unpack, source_of.descriptor, members, folder / _UNPACKED))
        return folder / _UNPACKED

    async def fill(self, container: Container, layer: Path) -> None:
        """Put the container's changes to its image into its new writable layer, before that is mounted."""
        upper = self._images.snapshots.upper(container.id)
        await in_thread(_make_upper, upper)
        diff = layer / documents.DIFF
        if await in_thread(_is_file, diff):
            await self._unpack(diff, upper, container)
        await in_long_thread(_remove_names, upper, source.deleted_names(layer))
        await in_long_thread(source.link_images, layer, self._folder(container))

    async def check(self, container: Container, runtime: OciRuntime, layer: Path, spec: config.Spec) -> None:
        """Compare the checkpoint with the container's spec, then put VOLUMEs and shared memory in place.

        The cgroup gets its limits at the same time. Raises InvalidArgumentError for what the configuration does not
        give.
        """
        limiting = asyncio.ensure_future(self._limit(container, runtime))
        try:
            await self._compare(container, layer, spec)
            await wait_out(limiting)
        finally:
            if not limiting.done():
                limiting.cancel()
            await ended(limiting)

    async def _limit(self, container: Container, runtime: OciRuntime) -> None:
        """Give the cgroup the limits of the container's spec, unless it has them."""
        digest = await in_thread(self._missing_limits, container)
        if digest:
            await in_thread(self._cgroups.make, container.record.cgroup)
            await set_limits(container, runtime)
            container.limited = digest

    def _missing_limits(self, container: Container) -> bytes:
        """A digest of the container's spec; empty if its cgroup has the limits of that. Blocks."""
        digest = hashlib.sha256(container.folder.spec.read_bytes()).digest()
        there = all(folder.is_dir() for folder in self._cgroups.folders(container.record.cgroup))
        return b"" if there and container.limited == digest else digest

    async def _compare(self, container: Container, layer: Path, spec: config.Spec) -> None:
        try:
            cgroup_set = await in_long_thread(check_rights, layer / documents.IMAGES, spec)
        except (InvalidArgumentError, UnsupportedError) as error:
            error.add_context(f"{container.title} cannot be restored")
            raise
        hostname = container.sandbox.config.hostname or os.uname().nodename
        await in_long_thread(source.rewrite, layer, self._folder(container), cgroup_set, spec.process, hostname)
        volumes = self._images.snapshots.upper(container.id).parent / documents.VOLUMES
        for saved in await in_thread(_saved_volumes, layer, volumes):
            folder = volumes / saved.stem
            await in_long_thread(remove_tree, folder)
            await in_thread(partial(folder.mkdir, mode=0o755))
            await self._unpack(saved, folder, container)
        shared = layer / documents.SHARED_MEMORY
        if container.sandbox.namespace_options.ipc != cri_pb2.NODE and await in_thread(_is_file, shared):
            await self._unpack(shared, container.sandbox.folder.shm, container)

    async def run(self, container: Container, runtime: OciRuntime, request: MonitorRequest) -> None:
        """Continue the processes of a container that was made from a checkpoint, with a conmon.

        Raises WrongStateError with CRIU's reason. The caller ends what was made of the container.
        """
        folder = self._folder(container)
        configuration = container.folder.path / "criu.conf"
        procs = self._cgroups.entrances(container.record.cgroup)
        restoring = Restoring(folder, tuple(procs), self._support.environment(configuration))
        monitor = self._monitors.prepare(request, restoring)
        container.restoring = asyncio.Event()
        given_up: list[str] = []
        ending = asyncio.create_task(self._end_endless(container, given_up))
        try:
            monitor.begin()  # its program loads meanwhile
            await in_thread(self._cgroups.kill, container.record.cgroup)  # of a start that was interrupted
            await self._limit(container, runtime)
            await in_thread(configuration.write_text, "tcp-close\n")
            monitored = await monitor.create()
        except PodkeelError as error:
            await monitor.abandon()
            if container.killed:
                given_up.append("it was stopped meanwhile")
            if not given_up and not isinstance(error, RuntimeRefusedError):
                raise
            log = container.folder.path / "restore.log"
            why = given_up[0] if given_up else await in_thread(criu_log.reason, log)
            kept = await in_thread(criu_log.keep, log, self._support.failure_log_dir, container.id)
            raise WrongStateError(f"{container.title} cannot be restored: {why or error.message}{kept}") from error
        except BaseException:
            await monitor.abandon()
            raise
        finally:
            ending.cancel()
            container.restoring.set()
            container.restoring = None
        container.monitor_descriptor = monitored.monitor_descriptor
        container.record.monitor = monitored.monitor
        container.record.init = monitored.init
        dropping = asyncio.create_task(in_long_thread(self._drop_images, container))
        self._dropping.add(dropping)
        dropping.add_done_callback(self._dropping.discard)

    async def _end_endless(self, container: Container, why: list[str]) -> None:
        """Kill a restore that does not end, or that fills the run folder with its log; ``why`` gets the reason.

        The time that it has grows with the memory that is restored.
        """
        log = container.folder.path / "restore.log"
        allowed = _SECONDS + await in_thread(_memory, self._folder(container)) / _SLOWEST
        begin = time.monotonic()
        while time.monotonic() < begin + allowed:
            await asyncio.sleep(_LOOK_SECONDS)
            if await in_thread(_length, log) > _MAX_LOG_BYTES:
                why.append(f"CRIU wrote more than {_MAX_LOG_BYTES >> 20} MiB of log")
                break
        else:
            why.append(f"CRIU did not end within {allowed:.0f} s")
        await in_thread(self._cgroups.kill, container.record.cgroup)

    def _drop_images(self, container: Container) -> None:
        """Remove the images, which are in memory now. What is left is removed with the container. Blocks."""
        for folder in (self._folder(container), self._folder(container).parent / _UNPACKED):
            for complaint in remove_tree(folder):
                _log.warning("%s: the images of its checkpoint: cannot be removed: %s", container.title, complaint)

    async def fill_shared_memory(self, sandbox: Sandbox, archive: Path | None) -> None:
        """Restore the saved content of /dev/shm in a new pod. None means no content."""
        if archive is not None:
            subject = f"{sandbox.title}: the checkpoint's {archive.name}"
            await self._images.layers.fetcher.unpack(_pieces(archive), Descriptor(), sandbox.folder.shm, subject)

    def _folder(self, container: Container) -> Path:
        return self._images.snapshots.upper(container.id).parent / documents.IMAGES

    async def _unpack(self, archive: Path, folder: Path, container: Container) -> None:
        """Unpack a tar file of the checkpoint by the confined process that unpacks layers; a small one needs none."""
        if await in_thread(tar_files.unpack_small, archive, folder):
            return
        subject = f"{container.title}: the checkpoint's {archive.name}"
        await self._images.layers.fetcher.unpack(_pieces(archive), Descriptor(), folder, subject)


async def _pieces(path: Path) -> AsyncGenerator[bytes, None]:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = await acquired(in_image_thread, lambda: os.open(path, flags), os.close)
    try:
        position = 0
        while piece := await in_image_thread(os.pread, descriptor, _PIECE, position):
            position += len(piece)
            yield piece
    finally:
        os.close(descriptor)


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _length(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _memory(images: Path) -> int:
    """Bytes of memory in a checkpoint."""
    return sum(_length(path) for path in images.glob("pages-*.img"))


def _make_upper(upper: Path) -> None:
    upper.parent.mkdir(mode=0o700, exist_ok=True)
    upper.mkdir(mode=0o755)


def _saved_volumes(layer: Path, volumes: Path) -> list[Path]:
    """The VOLUMEs of the checkpoint that the new container also has."""
    folder = layer / documents.VOLUMES
    if not stat.S_ISDIR(folder.lstat().st_mode) if folder.exists() else True:
        return []
    return [path for path in sorted(folder.iterdir()) if _is_file(path) and (volumes / path.stem).is_dir()]


def _remove_names(upper: Path, names: list[str]) -> None:
    """Hide the image's files ``names`` by whiteouts of overlayfs, and remove them from ``upper``. Blocks."""
    root = os.open(upper, _FOLDER)
    try:
        for name in names:
            _remove_name(root, name)
    finally:
        os.close(root)


def _remove_name(root: int, name: str) -> None:
    *parents, last = name.split("/")
    folder = os.dup(root)
    try:
        for parent in parents:
            with suppress(FileExistsError):
                os.mkdir(parent, 0o755, dir_fd=folder)
            below = open_below(folder, parent, _FOLDER)
            os.close(folder)
            folder = below
        try:
            os.mknod(last, stat.S_IFCHR, 0, dir_fd=folder)
        except FileExistsError:
            return  # the container created it again, so it stays
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):  # its parent is no longer a folder
            raise
    finally:
        os.close(folder)
