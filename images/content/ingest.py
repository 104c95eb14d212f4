"""Ingests: compressed layers that are being fetched, stored by digest, so that a later pull can resume them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from host.concurrency.threads import acquired, in_image_thread, in_long_thread
from images.content.trash import Trash
from images.oci.digests import is_digest

_CHUNK = 1 << 20
_MIN_WAIT_SECONDS = 1.0
OTHER_REGISTRY_SECONDS = 5.0  # seconds to wait for a transfer from another registry
_MAX_CHUNKS = 512  # of one writev(2)


class PartialBlob:
    """The open file that a blob is written to. ``size`` is its length in bytes when it was opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.size = os.fstat(self._descriptor).st_size

    def append(self, chunks: Sequence[bytes]) -> None:
        """Append all ``chunks`` to the file; blocks."""
        write_all(self._descriptor, chunks)

    def restart(self) -> None:
        """Start with a new empty file, because the old one may have another name that is in use."""
        os.close(self._descriptor)
        self.path.unlink(missing_ok=True)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.size = 0

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The existing bytes, piece by piece."""
        position = 0
        while position < self.size:
            chunk = await in_image_thread(os.pread, self._descriptor, min(_CHUNK, self.size - position), position)
            position += len(chunk)
            yield chunk

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def write_all(descriptor: int, chunks: Sequence[bytes]) -> None:
    """Write all ``chunks`` with few system calls; blocks."""
    for begin in range(0, len(chunks), _MAX_CHUNKS):
        some = chunks[begin : begin + _MAX_CHUNKS]
        written = os.writev(descriptor, some)
        if written < sum(map(len, some)):
            rest = memoryview(b"".join(some))
            while written < len(rest):
                written += os.write(descriptor, rest[written:])


@asynccontextmanager
async def new_blob(path: Path) -> AsyncIterator[PartialBlob]:
    """Provide a blob at ``path`` that no other pull will resume."""
    with contextlib.closing(await _opened(path)) as blob:
        yield blob


async def _opened(path: Path) -> PartialBlob:
    return await acquired(in_image_thread, lambda: PartialBlob(path), PartialBlob.close)


def publish(partial: Path, target: Path) -> None:
    """Rename a complete blob to its final name, with one rename; blocks."""
    try:
        partial.replace(target)
    except FileNotFoundError:
        if not target.exists():  # another layer with the same blob may have renamed it
            raise
    partial.unlink(missing_ok=True)  # rename(2) does nothing if both are names of one file


class PartialBlobs:
    """The folder of partial blobs. Its files are not trusted: a pull that resumes one checks the whole digest.

    A partial blob is deleted when its layer is on the node, or ``max_age`` seconds after a transfer last added to it.
    """

    def __init__(self, folder: Path, trash: Trash, max_age: float) -> None:
        self._folder = folder
        self._trash = trash
        self._max_age = max_age
        self._sizes: dict[str, int] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._users: dict[str, int] = {}
        self._registries: dict[str, str] = {}  # the source of each blob that a transfer is adding to
        self._timer: asyncio.TimerHandle | None = None
        self._dropping: asyncio.Task[None] | None = None

    @property
    def used_bytes(self) -> int:
        """Their size in bytes, without those that are being written."""
        return sum(tuple(self._sizes.values()))  # a copy, because threads change it

    @property
    def used_inodes(self) -> int:
        """Their number, without those that are being written."""
        return len(self._sizes)

    def size(self, digest: str) -> int:
        """The bytes of the partial blob of that digest; 0 if there is none or a transfer adds to it."""
        return self._sizes.get(digest, 0)

    def path(self, digest: str) -> Path:
        """The path of the partial blob of that digest, whether it exists or not."""
        return self._folder / digest.replace(":", "-")

    async def start(self) -> None:
        """Read the existing partial blobs. Delete those that are too old, and all other files."""
        self._sizes = await in_long_thread(self._read_files)
        await self.drop_old()

    async def close(self) -> None:
        """Stop deleting old partial blobs."""
        if self._timer is not None:
            self._timer.cancel()
        if self._dropping is not None:
            await asyncio.wait((self._dropping,))

    def _read_files(self) -> dict[str, int]:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = {}
        for path in self._folder.iterdir():
            digest = path.name.replace("-", ":", 1)
            if is_digest(digest) and path.is_file() and not path.is_symlink():
                found[digest] = path.stat().st_size
            else:
                self._trash.throw(path)
        return found

    @asynccontextmanager
    async def locked(self, digest: str, registry: str) -> AsyncIterator[bool]:
        """Lock the partial blob for the block. The value is whether this succeeded.

        Waits until other transfers from the same registry release it. Waits only ``OTHER_REGISTRY_SECONDS`` for one
        from another registry, which may be slow; then the value is False.
        """
        with self._user(digest):
            lock = self._locks[digest]
            while not await _acquired(lock):
                if self._registries.get(digest, registry) != registry:
                    yield False
                    return
            self._registries[digest] = registry
            try:
                yield True
            finally:
                del self._registries[digest]
                lock.release()

    @asynccontextmanager
    async def opened(self, digest: str, kept: Path) -> AsyncIterator[PartialBlob]:
        """Open the partial blob for the pull that has it ``locked``. Creates an empty one if none exists.

        If none exists but there is a file at ``kept``, that file is used: the whole blob, kept for another layer.
        """
        linked = await in_image_thread(_link, kept, self.path(digest))
        blob = await _opened(self.path(digest))
        self._sizes.pop(digest, None)
        try:
            yield blob
        except BaseException:
            if linked:
                await in_image_thread(self.path(digest).unlink, missing_ok=True)
            raise
        finally:
            blob.close()
            await in_image_thread(self._record_size, digest)

    @asynccontextmanager
    async def _alone(self, digest: str) -> AsyncIterator[None]:
        with self._user(digest):
            async with self._locks[digest]:
                yield

    @contextmanager
    def _user(self, digest: str) -> Iterator[None]:
        self._users[digest] = self._users.get(digest, 0) + 1
        if self._timer is None:
            self._schedule_drop(self._max_age)
        try:
            yield
        finally:
            self._users[digest] -= 1
            if not self._users[digest]:
                del self._users[digest], self._locks[digest]

    async def keep(self, digest: str, whole: Path) -> None:
        """Keep the ``whole`` blob of a removed layer that no image used, because a pull may need it again.

        Deletes it instead if a pull is adding to the partial blob: that may take long, and this call must not wait.
        """
        if digest in self._users:
            await in_image_thread(self._trash.throw, whole)
            self._trash.wake()
            return

        def work() -> None:
            _move(whole, self.path(digest))
            self._record_size(digest)

        async with self._alone(digest):
            await in_image_thread(work)

    async def drop(self, digests: Iterable[str]) -> None:
        """Delete those of ``digests`` that no pull is using. Success if there are none."""
        for digest in digests:
            if digest in self._sizes and digest not in self._users:
                async with self._alone(digest):
                    del self._sizes[digest]
                    await in_image_thread(self._trash.throw, self.path(digest))
                self._trash.wake()

    async def drop_all(self) -> None:
        """Delete all that no pull is using, to free disk space."""
        await self.drop(tuple(self._sizes))

    async def drop_old(self) -> None:
        """Delete those that no pull has added to for ``max_age``. Schedules itself for when the next one is as old."""
        ages = await in_image_thread(lambda: {digest: _age(self.path(digest)) for digest in tuple(self._sizes)})
        await self.drop([digest for digest, age in ages.items() if age >= self._max_age])
        left = [age for digest, age in ages.items() if digest in self._sizes]
        if left or self._users:
            self._schedule_drop(self._max_age - max(left, default=0.0))

    def _schedule_drop(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(max(seconds, _MIN_WAIT_SECONDS), self._start_drop)

    def _start_drop(self) -> None:
        self._timer = None
        self._dropping = asyncio.create_task(self.drop_old(), name="partial blobs")

    def _record_size(self, digest: str) -> None:
        """Record the size that a transfer left. Deletes an empty file.

        Blocks, so that a cancellation cannot interrupt it.
        """
        size = _size_left(self.path(digest))
        if size:
            self._sizes[digest] = size


async def _acquired(lock: asyncio.Lock) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(OTHER_REGISTRY_SECONDS):
            return await lock.acquire()
    return False


def _link(kept: Path, path: Path) -> bool:
    """Make ``path`` a hard link to ``kept``, unless ``path`` exists. Returns whether the link was made."""
    with contextlib.suppress(FileNotFoundError, FileExistsError):
        path.hardlink_to(kept)
        return True
    return False


def _move(source: Path, target: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.utime(source)
        publish(source, target)


def _size_left(path: Path) -> int:
    """The size of the file; 0 if it does not exist. Deletes an empty file."""
    with contextlib.suppress(FileNotFoundError):
        size = path.stat().st_size
        if not size:
            path.unlink()
        return size
    return 0


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
