"""Sends a layer to the unpack worker: hashes, keeps and writes its bytes to a pipe, in batches on a thread."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import select
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor

from host.concurrency.threads import in_image_thread
from host.errors import InvalidArgumentError, LimitError, NoSpaceError, PodkeelError
from images.content.ingest import PartialBlob
from images.oci import digests
from images.oci.manifests import Descriptor

BATCH = 1 << 20
_MAX_CHUNKS = 512  # of one writev(2)
_SET_PIPE_SIZE = 1031


class TimeLimit:
    """The seconds that others may still wait for the worker."""

    def __init__(self, seconds: float, subject: str) -> None:
        self.left = seconds
        self.subject = subject
        self.error = LimitError(
            f"{subject} is over the limits: unpacking it takes more than {seconds:g} s (images.max_layer_seconds)"
        )

    def wait_writable(self, descriptor: int) -> None:
        """Wait until the pipe is writable or has no reader. Blocks. Raises LimitError after the allowed time."""
        began = time.monotonic()
        poller = select.poll()  # select(2) takes no descriptor above 1023
        poller.register(descriptor, select.POLLOUT)
        ready = poller.poll(max(0.0, self.left) * 1000)
        self.left -= time.monotonic() - began
        if not ready:
            raise self.error


class WorkerFeed:
    """Writes chunks to the worker's ``pipe``, and appends to ``keep`` those it lacks. ``close`` closes the pipe."""

    def __init__(
        self,
        pipe: int,
        keep: PartialBlob | None,
        descriptor: Descriptor,
        threads: ThreadPoolExecutor,
        time_limit: TimeLimit,
    ) -> None:
        os.set_blocking(pipe, False)
        with contextlib.suppress(PermissionError):  # over the user's limit for pipes: the default size works too
            fcntl.fcntl(pipe, _SET_PIPE_SIZE, BATCH)
        self._pipe = pipe
        self._closed = False
        self._keep = keep
        self._skipped = keep.size if keep is not None else 0
        self._descriptor = descriptor
        self._subject = time_limit.subject
        self._threads = threads
        self._time_limit = time_limit
        self._hash = digests.hasher(descriptor.digest)
        self._algorithm = descriptor.digest.partition(":")[0] or "sha256"
        self._busy: asyncio.Future[None] | None = None
        self._batch: list[bytes] = []
        self.size = 0

    @property
    def digest(self) -> str:
        """The digest of the bytes so far."""
        return f"{self._algorithm}:{self._hash.hexdigest()}"

    async def send_all(self, chunks: AsyncGenerator[bytes, None]) -> None:
        """Send all chunks, then check size and digest. BrokenPipeError if the worker stops reading."""
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

    async def finish(self) -> None:
        """Wait for the thread, and append the unsent chunks to ``keep``.

        The worker must have ended, so that it cannot block the thread.
        """
        if self._busy is not None:
            await asyncio.wait((self._busy,))
            self._busy.exception()
            self._busy = None
        with contextlib.suppress(PodkeelError):
            await in_image_thread(self._save, self._batch)

    def _pass_on(self, batch: list[bytes]) -> None:
        for chunk in batch:
            self._hash.update(chunk)
        self._save(batch)
        self._write(batch)

    def _write(self, batch: Sequence[bytes]) -> None:
        """Write the whole batch. BrokenPipeError if the worker has ended, LimitError if it is too slow."""
        for begin in range(0, len(batch), _MAX_CHUNKS):
            rest = [memoryview(chunk) for chunk in batch[begin : begin + _MAX_CHUNKS] if chunk]
            while rest:
                try:
                    written = os.writev(self._pipe, rest)
                except BlockingIOError:
                    self._time_limit.wait_writable(self._pipe)
                    continue
                while rest and written >= len(rest[0]):
                    written -= len(rest.pop(0))
                if written:
                    rest[0] = rest[0][written:]

    def _save(self, batch: list[bytes]) -> None:
        if self._keep is None:
            return
        while batch and self._skipped:  # the first bytes are from the partial blob
            self._skipped -= len(batch[0])
            batch = batch[1:]
        try:
            self._keep.append(batch)
        except OSError as error:
            self._keep = None  # the blob must not have a gap
            kind = NoSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else PodkeelError
            raise kind(f"{self._subject} could not be stored: {error.strerror}") from error

    def close(self) -> None:
        """Close the pipe, so that the worker reads the end of the layer."""
        if self._closed:
            return
        self._closed = True
        os.close(self._pipe)
