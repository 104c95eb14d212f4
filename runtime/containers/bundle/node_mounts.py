"""Mounts that appear on the node because a container has a volume inside a bidirectional one.

What the OCI runtime mounts in a bidirectional volume appears where the volume is on the node, and stays there when the
container ends. The next container's mounts would be on top of it: a volume inside a volume of the same file system
multiplies with each container, until the node can mount nothing. So the agent records these mounts and unmounts them
when the container has ended, unless they are in use or something is mounted in them. Those are tried again whenever
another such container ends, and at the agent's start.
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

# How long a container waits for another one that is being created, and its end for an unmount.
_TURN_SECONDS = 30.0
_UNMOUNT_SECONDS = 5.0

_log = logging.getLogger("podkeel.containers")


class _Mount(msgspec.Struct, frozen=True, array_like=True):
    """What identifies a mount: the kernel uses the numbers of mounts again."""

    number: int
    root: str
    target: str
    source: str


class _Record(msgspec.Struct):
    """What one container has mounted on the node; ``made`` is unknown (None) until it is created.

    ``before`` are the mounts that were at ``targets`` then. ``ended``: it is to be unmounted.
    """

    targets: list[str]
    before: list[_Mount]
    made: list[_Mount] | None = None
    ended: bool = False


class NodeMounts:
    """The records, a file for each container in ``folder``, which does not outlive a boot."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._turn = asyncio.Lock()
        self._unmounting = threading.Lock()

    @contextlib.asynccontextmanager
    async def recorded(
        self, container_id: str, wanted: Sequence[config.Mount], abandon: Callable[[], Awaitable[None]]
    ) -> AsyncIterator[None]:
        """Record what appears on the node within the block, in which the container with these mounts is created.

        One container after the other: their mounts could not be distinguished. If the block fails, ``abandon`` must end
        what it does. Raises UnavailableError.
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
        """Unmount what a container that has ended has left on the node. Repeatable.

        No caller waits long for a file server that does not answer.
        """
        if not self._file(container_id).exists():
            return
        work = asyncio.ensure_future(in_fresh_thread(self.unmount, container_id))
        await asyncio.wait({work}, timeout=_UNMOUNT_SECONDS)
        work.add_done_callback(partial(_log_failure, container_id))

    def unmount(self, container_id: str) -> None:
        """The same, blocking. Raises OSError."""
        with self._unmounting:
            record = self._read(container_id)
            if record is not None and not record.ended:
                if record.made is None:
                    record.made = _made(record)
                record.ended = True
                self._write(container_id, record)
            self._unmount_ended()

    def known(self) -> list[str]:
        """The containers with a record."""
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
        """Unmount what no container has any more, the newest first, as long as one mount after the other is free."""
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
                _log.warning("container %s: %s on the node stays mounted: it is in use", name[:13], made[0].target)
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
        new.write_text(json.dumps(msgspec.to_builtins(record)))  # msgspec encodes no names that are not UTF-8
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
    """Unmount a mount with nothing on it; False if it is in use, or another mount is at its place."""
    try:
        descriptor = os.open(mount.target, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if mounts.mount_id(descriptor) != mount.number:
                return False
        finally:
            os.close(descriptor)
        libc.umount(mount.target, mounts.UMOUNT_NOFOLLOW)  # never lazily: that would take mounts of others along
    except OSError:
        return False
    return True


def _log_failure(container_id: str, work: asyncio.Future[None]) -> None:
    if not work.cancelled() and (error := work.exception()) is not None:
        _log.warning("container %s: its mounts on the node cannot be removed: %s", container_id[:13], error)
