"""The agent's side of unpacking: a layer's bytes go to a confined worker while they arrive, hashed on the way."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib.util
import os
import sys
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from host import processes
from host.errors import InvalidArgumentError, LimitError, PodkeelError
from host.threads import in_image_thread
from images import digests
from images.manifests import Descriptor
from images.partials import PartialBlob, write_all

BATCH = 1 << 20
_SET_PIPE_SIZE = 1031
_START = (
    "import sys; sys.path[:0] = sys.argv[1:2]; sys.path += sys.argv[2:3]; from images.unpack_worker import main; main()"
)


class Unpacked(msgspec.Struct, frozen=True):
    """What a layer turned out to be: digests, and what it takes on disk in bytes and inodes.

    ``implied`` are the folders (relative, as bytes) that no entry described; ``opaque`` layers hide all below them.
    """

    diff_id: str
    blob_digest: str
    blob_bytes: int
    used_bytes: int
    used_inodes: int
    opaque: bool
    implied: tuple[bytes, ...]


class _Report(msgspec.Struct):
    error: str = ""
    message: str = ""
    diff_id: str = ""
    used_bytes: int = 0
    used_inodes: int = 0
    opaque: bool = False
    implied: list[str] = []


class Unpacker:
    """Unpacks layers, each in a worker process of its own; ``close`` ends its threads."""

    def __init__(self, *, max_bytes: int, max_entries: int, parallel: int) -> None:
        self._limits = (str(max_bytes), str(max_entries))
        self._threads = ThreadPoolExecutor(max_workers=parallel, thread_name_prefix="layer")

    def close(self) -> None:
        """End the threads; none is busy once the pulls are cancelled."""
        self._threads.shutdown(wait=True)

    async def unpack(
        self,
        chunks: AsyncGenerator[bytes, None],
        descriptor: Descriptor,
        folder: Path,
        keep: PartialBlob | None,
        subject: str,
    ) -> Unpacked:
        """Write the layer that ``chunks`` brings below ``folder``, and what ``keep`` lacks of its bytes to that.

        Digest and size of ``descriptor`` are checked (where it has them). Raises InvalidArgumentError for a broken
        layer and LimitError for one over the limits or a full disk, naming ``subject``; what was written stays for the
        caller to remove.
        """
        with contextlib.ExitStack() as stack:
            read_end, write_end = os.pipe2(os.O_CLOEXEC)
            child_end = contextlib.ExitStack()
            child_end.callback(os.close, read_end)
            stack.enter_context(child_end)
            feed = _Feed(write_end, keep, descriptor, subject, self._threads)
            stack.callback(feed.close)
            with contextlib.suppress(PermissionError):  # over the user's limit for pipes: the default size does too
                fcntl.fcntl(write_end, _SET_PIPE_SIZE, BATCH)
            run = processes.run(
                (sys.executable, "-I", "-S", "-c", _START, *_module_paths(), str(folder), *self._limits),
                descriptors={0: read_end},
                environment={},
                check=False,
                on_start=lambda pid: child_end.close(),
            )
            worker = asyncio.create_task(run)
            try:
                async with contextlib.aclosing(chunks):
                    await feed.send_all(chunks)
            except BrokenPipeError:
                pass  # the worker ended early and says why below
            except BaseException:
                worker.cancel()
                await asyncio.wait((worker,))
                await feed.settle()
                raise
            feed.close()
            completed = await _end_of(worker)
        report = _decode(completed, subject)
        return Unpacked(
            report.diff_id,
            feed.digest,
            feed.size,
            report.used_bytes,
            report.used_inodes,
            report.opaque,
            tuple(bytes.fromhex(name) for name in report.implied),
        )


class _Feed:
    """Hashes, keeps and passes on the bytes, a batch at a time on a thread while the next one arrives."""

    def __init__(
        self, pipe: int, keep: PartialBlob | None, descriptor: Descriptor, subject: str, threads: ThreadPoolExecutor
    ) -> None:
        self._pipe = pipe
        self._closed = False
        self._keep = keep
        self._there = keep.size if keep is not None else 0
        self._descriptor = descriptor
        self._subject = subject
        self._threads = threads
        self._hash = digests.hasher(descriptor.digest)
        self._algorithm = descriptor.digest.partition(":")[0] or "sha256"
        self._busy: asyncio.Future[None] | None = None
        self._batch: list[bytes] = []
        self.size = 0

    @property
    def digest(self) -> str:
        """The digest of what has passed."""
        return f"{self._algorithm}:{self._hash.hexdigest()}"

    async def send_all(self, chunks: AsyncGenerator[bytes, None]) -> None:
        """Pass on everything, then check size and digest; BrokenPipeError if the worker stops reading."""
        waiting = 0
        expected = self._descriptor.size
        async for chunk in chunks:
            self._batch.append(chunk)
            waiting += len(chunk)
            self.size += len(chunk)
            if 0 <= expected < self.size:
                raise InvalidArgumentError(
                    f"{self._subject} is broken: it is longer than the {expected} bytes it should be"
                )
            if waiting >= BATCH:
                await self._submit()
                waiting = 0
        await self._submit()
        await self._drain()
        if 0 <= expected != self.size:
            raise InvalidArgumentError(f"{self._subject} is broken: it has {self.size} bytes, expected {expected}")
        if self._descriptor.digest and self.digest != self._descriptor.digest:
            raise InvalidArgumentError(
                f"{self._subject} is broken: its digest is {self.digest}, expected {self._descriptor.digest}"
            )

    async def _submit(self) -> None:
        await self._drain()
        batch, self._batch = self._batch, []
        self._busy = asyncio.get_running_loop().run_in_executor(self._threads, self._pass_on, batch)

    async def _drain(self) -> None:
        if self._busy is not None:
            await asyncio.shield(self._busy)
            self._busy = None

    async def settle(self) -> None:
        """Wait for the thread, whatever comes of it, and keep what is left.

        The worker must be gone, so that the thread cannot be blocked by it.
        """
        if self._busy is not None:
            await asyncio.wait((self._busy,))
            self._busy.exception()
            self._busy = None
        with contextlib.suppress(LimitError):
            await in_image_thread(self._save, self._batch)

    def _pass_on(self, batch: list[bytes]) -> None:
        for chunk in batch:
            self._hash.update(chunk)
        self._save(batch)
        write_all(self._pipe, batch)

    def _save(self, batch: list[bytes]) -> None:
        if self._keep is None:
            return
        while batch and self._there:  # what came first is what the partial blob held
            self._there -= len(batch[0])
            batch = batch[1:]
        try:
            self._keep.append(batch)
        except OSError as error:
            self._keep = None  # nothing may come after a gap
            raise LimitError(f"{self._subject} could not be kept: {error.strerror}") from error

    def close(self) -> None:
        """Close the pipe, which tells the worker that the layer ends here."""
        if self._closed:
            return
        self._closed = True
        os.close(self._pipe)


async def _end_of(worker: asyncio.Task[processes.Completed]) -> processes.Completed:
    try:
        return await asyncio.shield(worker)
    except asyncio.CancelledError:
        worker.cancel()
        await asyncio.wait((worker,))
        raise


def _decode(completed: processes.Completed, subject: str) -> _Report:
    try:
        report = msgspec.json.decode(completed.stdout, type=_Report)
    except msgspec.MsgspecError:
        report = None
    if completed.status != 0 or report is None:
        output = completed.stderr.decode(errors="replace").strip()[-500:]
        raise PodkeelError(
            f"{subject} could not be unpacked: the worker ended with status {completed.status}: {output}"
        )
    message = bytes.fromhex(report.message).decode()
    match report.error:
        case "":
            return report
        case "invalid":
            raise InvalidArgumentError(f"{subject} is broken: {message}")
        case "limit":
            raise LimitError(f"{subject} is over the limits: {message}")
        case "space":
            raise LimitError(f"{subject} could not be unpacked, the disk is full: {message}")
    raise PodkeelError(f"{subject} could not be unpacked: {message}")


def _module_paths() -> tuple[str, str]:
    """Where the worker finds this program, and the decompressors."""
    spec = importlib.util.find_spec("isal") or importlib.util.find_spec("zstandard")
    packages = Path(spec.origin).parent.parent if spec is not None and spec.origin else Path()
    return str(Path(__file__).parent.parent), str(packages)
