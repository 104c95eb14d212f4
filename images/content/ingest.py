"""Compressed layers that are being fetched, kept by digest so that a later pull continues where one broke off."""

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
_SHORTEST_WAIT = 1.0
PATIENCE = 5.0  # seconds of waiting for a transfer from another registry
_MOST_CHUNKS = 512  # of one writev(2)


class PartialBlob:
    """A file that a blob is written to, open; ``size`` bytes of it were there when it was opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.size = os.fstat(self._descriptor).st_size

    def append(self, chunks: Sequence[bytes]) -> None:
        """Write all ``chunks`` to its end; blocking."""
        write_all(self._descriptor, chunks)

    def restart(self) -> None:
        """Begin with nothing, in a new file, as others may have this one under another name."""
        os.close(self._descriptor)
        self.path.unlink(missing_ok=True)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.size = 0

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The bytes that exist, piece by piece."""
        position = 0
        while position < self.size:
            chunk = await in_image_thread(os.pread, self._descriptor, min(_CHUNK, self.size - position), position)
            position += len(chunk)
            yield chunk

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def write_all(descriptor: int, chunks: Sequence[bytes]) -> None:
    """Write all ``chunks``, with few system calls; blocking."""
    for begin in range(0, len(chunks), _MOST_CHUNKS):
        some = chunks[begin : begin + _MOST_CHUNKS]
        written = os.writev(descriptor, some)
        if written < sum(map(len, some)):
            rest = memoryview(b"".join(some))
            while written < len(rest):
                written += os.write(descriptor, rest[written:])


@contextmanager
def new_blob(path: Path) -> Iterator[PartialBlob]:
    """A blob at ``path`` that no pull will continue."""
    with contextlib.closing(PartialBlob(path)) as blob:
        yield blob


def publish(partial: Path, target: Path) -> None:
    """Give a whole blob the name it is looked for by, with one rename; blocking."""
    try:
        partial.replace(target)
    except FileNotFoundError:
        if not target.exists():  # another layer with the same blob may have done it
            raise
    partial.unlink(missing_ok=True)  # rename(2) does nothing if both are names of one file


class PartialBlobs:
    """The folder of them. Nothing in it is trusted: the pull that continues one checks the digest of the whole.

    Each is deleted when its layer is on the node, and ``max_age`` seconds after a transfer last added to it.
    """

    def __init__(self, folder: Path, trash: Trash, max_age: float) -> None:
        self._folder = folder
        self._trash = trash
        self._max_age = max_age
        self._sizes: dict[str, int] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._users: dict[str, int] = {}
        self._registries: dict[str, str] = {}  # the registries of those that are being added to
        self._timer: asyncio.TimerHandle | None = None
        self._dropping: asyncio.Task[None] | None = None

    @property
    def used_bytes(self) -> int:
        """Their size, without those that are being written."""
        return sum(tuple(self._sizes.values()))  # threads add to it

    @property
    def used_inodes(self) -> int:
        """How many there are, without those that are being added to."""
        return len(self._sizes)

    def path(self, digest: str) -> Path:
        """Where the partial blob of that digest is or would be."""
        return self._folder / digest.replace(":", "-")

    async def start(self) -> None:
        """Read the existing files; delete those that are too old, and other files."""
        self._sizes = await in_long_thread(self._look)
        await self.drop_old()

    async def close(self) -> None:
        """Stop waiting for any to get old."""
        if self._timer is not None:
            self._timer.cancel()
        if self._dropping is not None:
            await asyncio.wait((self._dropping,))

    def _look(self) -> dict[str, int]:
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
    async def turn(self, digest: str, registry: str) -> AsyncIterator[bool]:
        """Whether the partial blob is for the block alone; others wait for its end.

        For a transfer from another registry, which may be slow, they wait only some seconds; then the value is False.
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
        """The partial blob, an empty one if there is none, for the pull that has the turn.

        If there is none, the file at ``kept`` is used: the whole blob, if another layer of this node has it.
        """
        linked = await in_image_thread(_link, kept, self.path(digest))
        blob = await acquired(in_image_thread, lambda: PartialBlob(self.path(digest)), PartialBlob.close)
        self._sizes.pop(digest, None)
        try:
            yield blob
        except BaseException:
            if linked:
                await in_image_thread(self.path(digest).unlink, missing_ok=True)
            raise
        finally:
            blob.close()
            await in_image_thread(self._note, digest)

    @asynccontextmanager
    async def _alone(self, digest: str) -> AsyncIterator[None]:
        with self._user(digest):
            async with self._locks[digest]:
                yield

    @contextmanager
    def _user(self, digest: str) -> Iterator[None]:
        self._users[digest] = self._users.get(digest, 0) + 1
        if self._timer is None:
            self._come_back(self._max_age)
        try:
            yield
        finally:
            self._users[digest] -= 1
            if not self._users[digest]:
                del self._users[digest], self._locks[digest]

    async def keep(self, digest: str, whole: Path) -> None:
        """Keep the ``whole`` blob of a removed layer that no image used: a pull may need it again.

        It is deleted if a pull adds to the partial blob, as that may take long and no call may wait for it.
        """
        if digest in self._users:
            await in_image_thread(self._trash.throw, whole)
            self._trash.wake()
            return

        def work() -> None:
            _move(whole, self.path(digest))
            self._note(digest)

        async with self._alone(digest):
            await in_image_thread(work)

    async def drop(self, digests: Iterable[str]) -> None:
        """Delete those of ``digests`` that no pull uses now; success if there are none."""
        for digest in digests:
            if digest in self._sizes and digest not in self._users:
                async with self._alone(digest):
                    del self._sizes[digest]
                    await in_image_thread(self._trash.throw, self.path(digest))
                self._trash.wake()

    async def drop_all(self) -> None:
        """Delete all that no pull uses now: their disk space is needed."""
        await self.drop(tuple(self._sizes))

    async def drop_old(self) -> None:
        """Delete those that no pull has added to for too long, and run again when the next one is as old."""
        ages = await in_image_thread(lambda: {digest: _age(self.path(digest)) for digest in tuple(self._sizes)})
        await self.drop([digest for digest, age in ages.items() if age >= self._max_age])
        left = [age for digest, age in ages.items() if digest in self._sizes]
        if left or self._users:
            self._come_back(self._max_age - max(left, default=0.0))

    def _come_back(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(max(seconds, _SHORTEST_WAIT), self._wake)

    def _wake(self) -> None:
        self._timer = None
        self._dropping = asyncio.create_task(self.drop_old(), name="partial blobs")

    def _note(self, digest: str) -> None:
        """Count what a transfer left; an empty file is deleted.

        Blocking, so that a cancellation cannot interrupt it.
        """
        size = _left(self.path(digest))
        if size:
            self._sizes[digest] = size


async def _acquired(lock: asyncio.Lock) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE):
            return await lock.acquire()
    return False


def _link(kept: Path, path: Path) -> bool:
    """Whether there was nothing at ``path`` and it is another name of ``kept`` now."""
    with contextlib.suppress(FileNotFoundError, FileExistsError):
        path.hardlink_to(kept)
        return True
    return False


def _move(source: Path, target: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.utime(source)
        publish(source, target)


def _left(path: Path) -> int:
    """The size of the file. An empty file is deleted."""
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
