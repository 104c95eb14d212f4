"""The agent's side of unpacking: hashes a layer's bytes and sends them to a confined worker while they arrive."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import select
import sys
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from host import processes
from host.concurrency.tasks import wait_out
from host.concurrency.threads import ResilientThreadPool, in_image_thread
from images.content.ingest import PartialBlob
from images.oci.manifests import Descriptor
from images.unpack.special_files import make_special_files
from images.unpack.worker_feed import TimeLimit, WorkerFeed
from images.unpack.worker_report import Unpacked, WorkerReport, decode_report
from images.unpack.worker_syscalls import worker_filter

P = ParamSpec("P")
T = TypeVar("T")

START = f"import sys; sys.path += sys.argv[1:3]; from {__package__}.worker import main; main()"
# A descriptor that every process of the worker keeps open while it runs.
_LIFELINE = 3
_SECONDS_TO_DIE = 10.0
WALL_TIME = 2  # the time limit is so many times the limit of processor time
_DECODED_AT_ONCE = 64 << 10
HELPED_FROM = 1 << 20  # bytes of a layer as fetched: smaller ones are done before a second process is of use


class Unpacker:
    """Unpacks layers, each in its own worker process. ``close`` stops its threads."""

    def __init__(self, *, max_bytes: int, max_entries: int, max_seconds: int, parallel: int) -> None:
        self._limits = (str(max_bytes), str(max_entries), str(max_seconds))
        self._seconds = max_seconds
        self._busy = 0  # layers that are being unpacked
        self._threads = ResilientThreadPool(max_workers=parallel, thread_name_prefix="layer")

    def close(self) -> None:
        """Stop the threads. Cancel all pulls first, so that none of them is busy."""
        self._threads.shutdown(wait=True)

    async def unpack(
        self,
        chunks: AsyncGenerator[bytes, None],
        descriptor: Descriptor,
        folder: Path,
        keep: PartialBlob | None,
        subject: str,
    ) -> Unpacked:
        """Unpack the layer in ``chunks`` below ``folder``, and append to ``keep`` the bytes that it lacks.

        Checks digest and size of ``descriptor``, if it has them. Raises InvalidArgumentError for a broken layer,
        LimitError for one over the limits or a full disk, naming ``subject``, and UnavailableError if the node has no
        libseccomp. After an error the worker has ended, and the caller removes the files in ``folder``.
        """
        time_limit = TimeLimit(WALL_TIME * self._seconds, subject)
        with contextlib.ExitStack() as stack:
            read_end, write_end = os.pipe2(os.O_CLOEXEC)
            alive, lifeline = os.pipe2(os.O_CLOEXEC)
            stack.callback(os.close, alive)
            self._busy += 1
            stack.callback(self._less_busy)
            process_count = 2 if descriptor.size >= HELPED_FROM and self._busy < (os.cpu_count() or 1) else 1
            child_ends = contextlib.ExitStack()
            child_ends.callback(os.close, read_end)
            child_ends.callback(os.close, lifeline)
            stack.enter_context(child_ends)
            feed = WorkerFeed(write_end, keep, descriptor, self._threads, time_limit)
            stack.callback(feed.close)
            compiled = await self._in_thread(worker_filter)
            arguments = (*module_paths(), str(process_count), str(folder), *self._limits, compiled.hex())
            run = processes.run(
                (sys.executable, "-I", "-S", "-c", START, *arguments),
                descriptors={0: read_end, _LIFELINE: lifeline},
                environment={},
                check=False,
                on_start=lambda pid: child_ends.close(),
            )
            worker = asyncio.create_task(run)
            worker.add_done_callback(lambda ended: child_ends.close())
            try:
                try:
                    async with contextlib.aclosing(chunks):
                        await feed.send_all(chunks)
                except BrokenPipeError:
                    pass  # the worker ended early, and its report says why
                feed.close()
                completed = await _end_of(worker, time_limit)
            except BaseException:
                worker.cancel()
                await asyncio.wait((worker,))
                await in_image_thread(_wait_closed, alive)
                await feed.finish()
                raise
        if len(completed.stdout) > _DECODED_AT_ONCE:
            report = await self._in_thread(decode_report, completed, subject)
        else:
            report = decode_report(completed, subject)
        return await self._finish(report, feed, folder, subject)

    def _less_busy(self) -> None:
        self._busy -= 1

    async def _finish(self, report: WorkerReport, feed: WorkerFeed, folder: Path, subject: str) -> Unpacked:
        if report.devices or report.opaque_folders:
            opaque = [bytes.fromhex(name) for name in report.opaque_folders]
            await self._in_thread(make_special_files, folder, report.devices, opaque, subject)
        return Unpacked(
            report.diff_id,
            feed.digest,
            feed.size,
            report.used_bytes,
            report.used_inodes,
            report.opaque,
            tuple(bytes.fromhex(name) for name in report.implied),
            tuple(bytes.fromhex(name) for name in report.hiding),
        )

    async def _in_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        future = asyncio.get_running_loop().run_in_executor(self._threads, lambda: work(*args, **kwargs))
        return await wait_out(future)


async def _end_of(worker: asyncio.Task[processes.Completed], time_limit: TimeLimit) -> processes.Completed:
    """The worker's result. Raises LimitError if it takes longer than allowed; then the worker is still running."""
    done, _ = await asyncio.wait((worker,), timeout=max(0.0, time_limit.left))
    if not done:
        raise time_limit.error
    return worker.result()


def _wait_closed(lifeline: int) -> None:
    """Wait until all processes of a killed worker have ended, because they could still write to the folder. Blocks."""
    poller = select.poll()
    poller.register(lifeline, select.POLLIN)
    while poller.poll(_SECONDS_TO_DIE * 1000) and os.read(lifeline, 1 << 16):
        pass


def module_paths() -> tuple[str, str]:
    """The folders from which the worker imports this program and the decompressors."""
    spec = importlib.util.find_spec("isal") or importlib.util.find_spec("zstandard")
    packages = Path(spec.origin).parent.parent if spec is not None and spec.origin else Path()
    return str(Path(__file__).parents[__name__.count(".")]), str(packages)
