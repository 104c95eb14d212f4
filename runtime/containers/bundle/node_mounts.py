"""Mounts that appear on the node because a container has a volume inside a bidirectional volume.

A mount of the OCI runtime in a bidirectional volume also appears on the node, and stays there when the container ends.
The mounts of the next container would be on top of it. A volume inside a volume of the same file system would multiply
with each container, until the node cannot mount anything. So the agent records these mounts. It unmounts them when the
container has ended, unless they are in use or have other mounts in them. It tries those again whenever another such
container ends, and at its start.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from host import libc
from host.concurrency.threads import in_fresh_thread
from host.errors import UnavailableError
from host.files import mounts
from host.files.mounts import MountEntry
from runtime.specgen import config
from runtime.specgen.mounts.shared_volumes import targets_on_node

# Time limits: for waiting for another container that is being created, and for an unmount at a container's end.
_TURN_SECONDS = 30.0
_UNMOUNT_SECONDS = 5.0

_log = logging.getLogger("podkeel.containers")


class _Mount(msgspec.Struct, frozen=True, array_like=True):
    """The identity of a mount: the kernel reuses the numbers of mounts."""

    number: int
    root: str
    target: str
    source: str


class _Record(msgspec.Struct):
    """The mounts of one container on the node. ``made`` is unknown (None) until the container is created.

    ``before`` are the mounts that were at ``targets`` before. ``ended``: the mounts are to be unmounted.
    """

    targets: list[str]
    before: list[_Mount]
    made: list[_Mount] | None = None
    ended: bool = False


class NodeMounts:
    """The records: a file for each container in ``folder``, which is empty after a reboot."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._turn = asyncio.Lock()
        self._unmounting = threading.Lock()

    @contextlib.asynccontextmanager
    async def recorded(
        self, container_id: str, wanted: Sequence[config.Mount], abandon: Callable[[], Awaitable[None]]
    ) -> AsyncIterator[None]:
        """Record the mounts that appear on the node during the block, in which the container is created.

        Only one container at a time can do this, because their mounts could not be distinguished. If the block fails,
        ``abandon`` must end its work. Raises UnavailableError.
        """
        targets = targets_on_node(wanted)
        if not targets:
            yield
            return
        try:
            async with asyncio.timeout(_TURN_SECONDS):
                await self._turn.acquire()
        except TimeoutError:
            raise UnavailableError(
                "another container with a volume in a bidirectional volume is being created: try again"
            ) from None
        try:
            await in_fresh_thread(self._begin, container_id, targets)
            try:
                yield
            except BaseException:
                await abandon()
                raise
            await in_fresh_thread(self._complete, container_id)
        finally:
            self._turn.release()

    async def release(self, container_id: str) -> None:
        """Unmount what an ended container has left on the node. May be repeated.

        If a file server does not answer, the caller does not wait long.
        """
        if not self._file(container_id).exists():
            return
        work = asyncio.ensure_future(in_fresh_thread(self.unmount, container_id))
        await asyncio.wait({work}, timeout=_UNMOUNT_SECONDS)
        work.add_done_callback(partial(_log_failure, container_id))

    def unmount(self, container_id: str) -> None:
        """As ``release``, but blocking. Raises OSError."""
        with self._unmounting:
            record = self._read(container_id)
            if record is not None and not record.ended:
                if record.made is None:
                    record.made = _made(record)
                record.ended = True
                self._write(container_id, record)
            self._unmount_ended()

    def known(self) -> list[str]:
        """The containers that have a record."""
        try:
            return sorted(entry.name for entry in self._folder.iterdir())
        except FileNotFoundError:
            return []

    def _begin(self, container_id: str, targets: list[str]) -> None:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._write(container_id, _Record(targets, _at(targets)))

    def _complete(self, container_id: str) -> None:
        record = self._read(container_id)
        if record is not None and not record.ended:
            record.made = _made(record)
            if record.made:
                self._write(container_id, record)
            else:
                self._file(container_id).unlink()

    def _unmount_ended(self) -> None:
        """Unmount the mounts of ended containers, the newest first, until one is in use."""
        records = {name: record for name in self.known() if (record := self._read(name)) is not None and record.ended}
        while True:
            table = {entry.mount_id: entry for entry in mounts.mount_table()}
            busy = {entry.parent_id for entry in table.values()}
            left = {name: [m for m in record.made or () if _is_there(m, table)] for name, record in records.items()}
            free = [mount for made in left.values() for mount in made if mount.number not in busy]
            if not sum(_unmount(mount) for mount in free):
                break
        for name, made in left.items():
            if made:
                _log.warning("container %s: %s stays mounted on the node: it is in use", name[:13], made[0].target)
            else:
                self._file(name).unlink(missing_ok=True)

    def _file(self, container_id: str) -> Path:
        return self._folder / container_id

    def _read(self, container_id: str) -> _Record | None:
        try:
            return msgspec.convert(json.loads(self._file(container_id).read_bytes()), _Record)
        except (OSError, ValueError):
            return None

    def _write(self, container_id: str, record: _Record) -> None:
        new = self._folder.with_name(f"{self._folder.name}.{container_id}")
        new.write_text(json.dumps(msgspec.to_builtins(record)))  # msgspec cannot encode names that are not UTF-8
        new.rename(self._file(container_id))


def _at(targets: Sequence[str]) -> list[_Mount]:
    wanted = frozenset(targets)
    return [_mount(entry) for entry in mounts.mount_table() if entry.target in wanted]


def _made(record: _Record) -> list[_Mount]:
    return [mount for mount in _at(record.targets) if mount not in record.before]


def _mount(entry: MountEntry) -> _Mount:
    return _Mount(entry.mount_id, entry.root, entry.target, entry.source)


def _is_there(mount: _Mount, table: dict[int, MountEntry]) -> bool:
    entry = table.get(mount.number)
    return entry is not None and _mount(entry) == mount


def _unmount(mount: _Mount) -> bool:
    """Unmount a mount without mounts on it. False if it is in use, or if there is another mount at its place."""
    try:
        descriptor = os.open(mount.target, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if mounts.mount_id(descriptor) != mount.number:
                return False
        finally:
            os.close(descriptor)
        libc.umount(mount.target, mounts.UMOUNT_NOFOLLOW)  # never lazily: that would also detach mounts of others
    except OSError:
        return False
    return True


def _log_failure(container_id: str, work: asyncio.Future[None]) -> None:
    if not work.cancelled() and (error := work.exception()) is not None:
        _log.warning("container %s: its mounts on the node cannot be removed: %s", container_id[:13], error)
