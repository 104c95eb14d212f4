"""The snapshots of containers: overlays of an image's shared layers and the container's writable layer."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import stat
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from host.concurrency.tasks import uninterrupted, wait_out
from host.concurrency.threads import in_long_thread, in_thread
from host.concurrency.undo import Undo
from host.database import Database
from host.errors import LimitError, NotFoundError, PodkeelError
from host.files import mounts
from host.files.removal import remove_tree
from host.files.set_aside import UnreadableRow
from images.content.trash import Trash
from images.image import Image
from images.layers.store import EMPTY_LAYER, LayerStore
from images.options import ImageOptions
from images.snapshots.idmapped_layers import clear, scratch_of, with_mapped_ids
from images.snapshots.overlay import mount_overlay, names_of
from images.snapshots.project_quota import ProjectQuotas
from images.snapshots.usage import WritableLayers
from images.usage import FilesystemUsage

_log = logging.getLogger("podkeel.images")

_OWN_INODES = 3  # the container's folder, work, and overlayfs's folder in work; upper is counted with its content
_DISK_BLOCK = 4096


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A mounted root file system. ``target`` is the mount point, ``upper`` the folder of the writable layer."""

    container_id: str
    image_id: str
    target: Path
    upper: Path


class SnapshotStore:
    """Makes and removes snapshots. The layers of a snapshot stay as long as the snapshot, even without their image."""

    def __init__(
        self, options: ImageOptions, data_dir: Path, database: Database, layers: LayerStore, trash: Trash
    ) -> None:
        self._containers = data_dir / "containers"
        self._data_dir = data_dir
        self._database = database
        self._layers = layers
        self._trash = trash
        self._held: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._volatile = ",volatile"
        self.project_quotas = options.project_quotas
        quotas = ProjectQuotas(self._containers, options.project_ids) if options.project_quotas != "off" else None
        self.writable = WritableLayers(self.upper, quotas)

    async def start(self) -> None:
        """Read the snapshots and retain their layers."""
        self._containers.mkdir(mode=0o700, parents=True, exist_ok=True)
        found, repaired = await in_thread(self._read)
        if repaired:
            repair = "UPDATE snapshots SET layers = ? WHERE id = ?"
            await self._database.write(lambda connection: connection.executemany(repair, repaired) and None)
        for key, container_id, layers in found:
            self._held[key] = (container_id, layers)
            self._layers.retain(layers)
        await in_long_thread(self._start_usage)

    def _read(self) -> tuple[list[tuple[str, str, tuple[int, ...]]], list[tuple[str, str]]]:
        """The snapshots with their layers. A row without valid layers gets those of its image."""
        found: list[tuple[str, str, tuple[int, ...]]] = []
        repaired: list[tuple[str, str]] = []
        unreadable: list[UnreadableRow] = []
        of_image = "SELECT layer FROM image_layers WHERE image_id = ? ORDER BY position"
        for row in self._database.read("SELECT id, container_id, image_id, layers FROM snapshots"):
            key, container_id, image_id, text = row
            if not _is_name(container_id) or key.partition(" ")[0] != container_id:
                unreadable.append(UnreadableRow("snapshot", key, "its container's id is invalid", row))
                continue
            try:
                layers = tuple(msgspec.json.decode(text, type=list[int]))
            except (msgspec.MsgspecError, ValueError, TypeError) as error:
                layers = tuple(number for (number,) in self._database.read(of_image, (image_id,)))
                _log.error(
                    "snapshot of container %s: row cannot be read, using the layers of its image: %s",
                    container_id,
                    error,
                )
                repaired.append((json.dumps(layers), key))
            found.append((key, container_id, layers))
        self._database.set_rows_aside(unreadable, ("snapshots", "id"))
        return found, repaired

    def ids(self) -> frozenset[str]:
        """The containers with a snapshot or a mounted image, also an incomplete one."""
        return frozenset(container_id for container_id, _ in self._held.values())

    def stacks(self) -> Collection[tuple[int, ...]]:
        """The layers of each snapshot, lowest first."""
        return [layers for _, layers in self._held.values()]

    def upper(self, container_id: str) -> Path:
        """The folder of the container's writable layer."""
        return self._containers / container_id / "upper"

    def lower(self, container_id: str) -> list[Path]:
        """The folders below the container's writable layer, the topmost first. Raises NotFoundError."""
        held = self._held.get(container_id)
        if held is None:
            raise NotFoundError(f"container {container_id} has no root file system any more")
        return self._paths(held[1])

    async def prepare(
        self,
        container_id: str,
        image: Image,
        *,
        target: Path,
        user_namespace: Path | None = None,
        mount_label: str = "",
    ) -> Snapshot:
        """Mount a new writable root file system for the container at ``target``, which is created.

        With a ``user_namespace`` (its pinned path) the files have the owners that it maps them to. With a
        ``mount_label`` all files have that SELinux label. Raises NotFoundError if the image has been removed,
        LimitError if it has too many layers for the kernel, UnsupportedError if ids cannot be mapped here. An error
        leaves nothing behind.
        """
        lower = self._lower(image)
        async with Undo(f"snapshot of container {container_id}") as undo:
            undo.push("the snapshot", lambda: self._discard(container_id, target))
            # Removing the container undoes a mount without a row too, so mount and row are made at the same time.
            held = asyncio.ensure_future(self._hold(container_id, container_id, image))
            folder = self._containers / container_id
            try:
                await in_thread(self._mount_writable, folder, target, lower, user_namespace, mount_label)
            finally:
                await wait_out(held)
        return Snapshot(container_id, image.id, target, folder / "upper")

    async def mount_image(
        self,
        container_id: str,
        image: Image,
        *,
        target: Path,
        user_namespace: Path | None = None,
        mount_label: str = "",
    ) -> None:
        """Mount the image read-only at ``target``, which is created, for the container.

        ``user_namespace``, ``mount_label`` and errors are as for ``prepare``. ``unmount`` with the same target undoes
        it; ``remove`` releases everything of a container.
        """
        lower = self._lower(image)
        key = f"{container_id} {target}"
        async with Undo(f"image {image.name} mounted for container {container_id}") as undo:
            undo.push("the mount", lambda: self.unmount(container_id, target))
            await self._hold(key, container_id, image)
            await in_thread(self._mount_read_only, target, lower, user_namespace, mount_label)

    async def unmount(self, container_id: str, target: Path) -> None:
        """Undo ``prepare`` or ``mount_image`` at ``target``. Success if nothing is mounted there."""
        await in_thread(_unmount, target)
        await uninterrupted(self._release([f"{container_id} {target}"]))

    async def remove(self, container_id: str) -> None:
        """Remove the container's folder with its content and release its layers. Success if there is none.

        The caller must unmount everything in it first.
        """
        await in_thread(self._throw_away, container_id)
        self.writable.forget(container_id)
        self._trash.wake()
        await uninterrupted(self._release([key for key, (owner, _) in self._held.items() if owner == container_id]))

    def filesystem_usage(self) -> FilesystemUsage:
        """The size of the containers' folders, with the last known size of the data in them; for any thread."""
        used = inodes = 0
        for container_id in [key for key in tuple(self._held) if " " not in key]:
            used += _OWN_INODES * _DISK_BLOCK
            inodes += _OWN_INODES
            written = self.writable.usage(container_id)
            if written is not None:
                used += written.used_bytes
                inodes += written.inodes
        return FilesystemUsage(str(self._data_dir), used, inodes)

    async def close(self) -> None:
        """Stop counting the usage of writable layers."""
        await in_thread(self.writable.close)

    def _start_usage(self) -> None:
        reason = self.writable.open()
        if reason:
            _log.info("snapshots: usage is counted in the background, not by project quota: %s", reason)
            return
        _log.info("snapshots: usage is counted by project quota (images.project_quotas)")
        for container_id in self.ids():
            self.writable.find_project(container_id)

    async def _hold(self, key: str, container_id: str, image: Image) -> None:
        self._layers.retain(image.layers)
        self._held[key] = (container_id, image.layers)
        await self._database.execute(
            "INSERT OR REPLACE INTO snapshots (id, container_id, image_id, layers) VALUES (?, ?, ?, ?)",
            (key, container_id, image.id, json.dumps(image.layers)),
        )

    async def _release(self, keys: Sequence[str]) -> None:
        held = [(key, self._held.pop(key)[1]) for key in keys if key in self._held]
        if not held:
            return
        rows = [(key,) for key, _ in held]
        await self._database.write(
            lambda connection: connection.executemany("DELETE FROM snapshots WHERE id = ?", rows) and None
        )
        for _, layers in held:
            await self._layers.release(layers)

    async def _discard(self, container_id: str, target: Path) -> None:
        await in_thread(_unmount, target)
        await self.remove(container_id)

    def _lower(self, image: Image) -> list[Path]:
        if not self._layers.has(image.layers):
            raise NotFoundError(f"image {image.name} was removed: pull it again")
        return self._paths(image.layers)

    def _paths(self, numbers: Sequence[int]) -> list[Path]:
        """The folders to overlay, topmost first, without those below an opaque layer."""
        paths = []
        for number in reversed(numbers):
            paths.append(self._layers.path(number))
            layer = self._layers.get(number)
            if layer is not None and layer.opaque:
                break
        return paths or [self._layers.path(EMPTY_LAYER)]

    def _mount_writable(
        self,
        folder: Path,
        target: Path,
        lower: Sequence[Path],
        user_namespace: Path | None = None,
        mount_label: str = "",
    ) -> None:
        upper, work = folder / "upper", folder / "work"
        new = not upper.exists()
        if not new:
            self._trash.throw(work)  # a volatile mount leaves a marker in it that forbids another mount
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
            if user_namespace is not None or self.project_quotas == "all":
                self._assign_project(folder.name)
        for path in (upper, work):
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o700)
        target.mkdir(parents=True, exist_ok=True)
        # New files keep the ids that the container writes them with, so only the layers below need mapped ids.
        with with_mapped_ids(lower, scratch_of(target), user_namespace) as seen:
            if new:  # the root folder gets owner and mode of the image's
                root = seen[0].stat()
                os.chown(upper, root.st_uid, root.st_gid)
                upper.chmod(stat.S_IMODE(root.st_mode))
            self._mount_overlay(target, seen, folder, mount_label)
        self.writable.measure_own(folder.name)

    def _assign_project(self, container_id: str) -> None:
        try:
            self.writable.assign_project(container_id)
        except (LimitError, OSError) as error:
            _log.warning("snapshot of container %s: usage is counted in the background: %s", container_id, error)

    def _mount_overlay(self, target: Path, lower: Sequence[Path], folder: Path, mount_label: str) -> None:
        options = mounts.context_option(mount_label)
        writable = (folder / "upper", folder / "work")
        try:
            mount_overlay(target, lower, writable, options + self._volatile)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._volatile:
                raise PodkeelError(f"overlay at {target} could not be mounted: {error.strerror}") from error
            self._volatile = ""  # a kernel before 5.10
            mount_overlay(target, lower, writable, options)

    def _mount_read_only(
        self, target: Path, lower: Sequence[Path], user_namespace: Path | None = None, mount_label: str = ""
    ) -> None:
        target.mkdir(parents=True, exist_ok=True)
        if len(lower) == 1:
            # Overlayfs needs two lower folders if there is no upper one.
            second = self._layers.path(EMPTY_LAYER).with_name("below")
            second.mkdir(exist_ok=True)
            lower = (*lower, second)
        with with_mapped_ids(lower, scratch_of(target), user_namespace) as seen:
            try:
                mount_overlay(target, seen, None, mounts.context_option(mount_label), mounts.MS_RDONLY)
            except OSError as error:
                raise PodkeelError(f"overlay at {target} could not be mounted: {error.strerror}") from error

    def _throw_away(self, container_id: str) -> None:
        self._trash.throw(self._containers / container_id)


def _is_name(text: str) -> bool:
    """Whether a folder can have that name."""
    return text not in ("", ".", "..") and "/" not in text and "\0" not in text


def _unmount(target: Path) -> None:
    mounts.unmount(target)
    clear(scratch_of(target))
    remove_tree(names_of(target))
    with contextlib.suppress(OSError):
        target.rmdir()
