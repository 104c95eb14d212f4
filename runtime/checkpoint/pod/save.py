"""CheckpointPod: containers of a pod are frozen together, saved to a folder, and continue (KEP-5823)."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from host.concurrency.tasks import ended, uninterrupted
from host.concurrency.threads import acquired, in_fresh_thread, in_long_thread, in_thread
from host.concurrency.undo import Undo
from host.errors import WrongStateError
from host.stages import Operation
from runtime.checkpoint import archive, documents
from runtime.checkpoint.capture import Tools
from runtime.checkpoint.long_work import stoppable
from runtime.checkpoint.pod import checks, interrupted
from runtime.checkpoint.pod.contents import refuse_objects, write_container
from runtime.checkpoint.pod.document import CONTAINERS, describe
from runtime.checkpoint.pod.options import leaves_out_sessions
from runtime.checkpoint.pod.place import Place, open_place
from runtime.oci.oci_runtime import OciRuntime
from runtime.state.container import Container
from runtime.state.sandbox import Sandbox
from runtime.state.transitions import of_sandbox

_AT_ONCE = 4  # containers that CRIU saves at the same time

_log = logging.getLogger("podkeel.checkpoint")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A checkpoint that is being made. ``work`` is the agent's own folder for it."""

    sandbox: Sandbox
    containers: Sequence[Container]
    runtime: OciRuntime
    output: str
    leave_out: bool
    work: Path

    @property
    def folders(self) -> list[str]:
        """The folders of the containers in the checkpoint."""
        return [f"{CONTAINERS}/{index}" for index in range(len(self.containers))]


class PodCheckpoints:
    """Makes checkpoints of pods. A pod can have only one checkpoint made at a time."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    async def checkpoint(
        self, sandbox_id: str, output: str, container_ids: Sequence[str], options: Mapping[str, str]
    ) -> int:
        """Write running containers of a pod to the empty folder ``output``. Returns the size in bytes.

        All of them are frozen before the first is saved, and until all are saved. After any error the folder is empty
        again and the containers run.

        Raises:
            NotFoundError: there is no such pod, container or folder.
            InvalidArgumentError: ``output``, ``container_ids`` or ``options`` is invalid.
            WrongStateError: a container does not run, the folder is not empty, or something cannot be saved.
            UnsupportedError: the runtime handler cannot make checkpoints here.
        """
        leave_out = leaves_out_sessions(options)
        sandbox = self._tools.state.get_sandbox(sandbox_id)
        containers = checks.selected(self._tools.state, sandbox, container_ids)
        runtime = self._tools.handlers.find(sandbox.record.handler)
        await self._tools.support.require(runtime, sandbox.record.handler)
        assert runtime is not None
        checks.require_able(sandbox, containers, runtime)
        _refuse_busy(sandbox, containers)
        folder = self._tools.layout.checkpoints / f"{interrupted.PREFIX}{sandbox.id}"
        job = _Job(
            sandbox=sandbox,
            containers=containers,
            runtime=runtime,
            output=output,
            leave_out=leave_out,
            work=folder,
        )
        work = asyncio.create_task(self._checkpoint(job))
        sandbox.checkpoint = work
        for container in containers:
            container.checkpoint = work
        try:
            return await _sharing(work, sandbox)
        finally:
            sandbox.checkpoint = None
            for container in containers:
                container.checkpoint = None

    async def _checkpoint(self, job: _Job) -> int:
        sandbox = job.sandbox
        operation = sandbox.begin("CheckpointPod")
        _log.info("%s: checkpoint: saving %d containers to %s", sandbox.title, len(job.containers), job.output)
        async with AsyncExitStack() as held:
            opening = partial(open_place, job.output, sandbox.title)
            descriptor = await acquired(in_fresh_thread, opening, os.close)
            held.callback(os.close, descriptor)
            place = Place(descriptor)
            async with Undo(sandbox.title) as undo:
                undo.push("the files of its checkpoint", partial(in_long_thread, interrupted.undo, job.work, place))
                async with operation.stage("reserve"):
                    await self._reserve(job, place)
                async with operation.stage("frozen"):
                    frozen = await self._save(job, place, operation)
                async with operation.stage("documents"):
                    size = await self._describe(job, place)
                async with operation.stage("commit"):
                    await in_long_thread(place.commit, self._document(job, frozen))
        # The checkpoint is complete: the remaining work is short.
        await uninterrupted(in_long_thread(interrupted.remove, job.work))
        words = "%s: checkpoint: %d bytes, frozen for %.0f ms"
        _log.info(words, sandbox.title, size, frozen * 1e3, extra=of_sandbox(sandbox, operation))
        return size

    async def _reserve(self, job: _Job, place: Place) -> None:
        await in_thread(partial(checks.refuse_sessions, job.sandbox, job.containers, leave_out=job.leave_out))
        for container in job.containers:
            await self._tools.capture.refuse_paused(container)
        ids = [container.id for container in job.containers]
        await in_thread(interrupted.begin, job.work, job.output, place, ids)
        await in_long_thread(place.make, job.folders)

    async def _save(self, job: _Job, place: Place, operation: Operation) -> float:
        """Save processes and files while all containers are frozen. Returns the seconds that they were frozen."""
        begin = time.perf_counter()
        async with Undo(job.sandbox.title) as undo:
            undo.push("its being frozen", partial(in_thread, self._thaw, job.containers))
            async with operation.stage("freeze"):
                for container in job.containers:
                    await self._tools.capture.freeze(container)
                await in_thread(checks.refuse_outsiders, job.containers, self._tools.cgroups)
            async with operation.stage("dump"):
                await self._dump(job, place)
            async with operation.stage("files"):
                saved = await in_thread(self._saved, job.containers)
                await stoppable(partial(_save_files, job, saved, place.root))
            async with operation.stage("thaw"):
                await in_thread(self._thaw, job.containers)
        return time.perf_counter() - begin

    async def _dump(self, job: _Job, place: Place) -> None:
        slots = asyncio.Semaphore(_AT_ONCE)

        async def one(container: Container, folder: str, work: Path) -> None:
            async with slots:
                images = place.root / folder / documents.IMAGES
                await self._tools.capture.dump(container, job.runtime, images, work)
                await in_thread(refuse_objects, images, container.title)

        works = [_work_of(job, index) for index in range(len(job.containers))]
        await _all_or_none([one(*each) for each in zip(job.containers, job.folders, works, strict=True)])

    def _saved(self, containers: Sequence[Container]) -> list[archive.Saved]:
        return [self._tools.capture.saved(container) for container in containers]

    def _thaw(self, containers: Sequence[Container]) -> None:
        for container in containers:
            self._tools.cgroups.thaw(container.record.cgroup)

    async def _describe(self, job: _Job, place: Place) -> int:
        for index, (container, folder) in enumerate(zip(job.containers, job.folders, strict=True)):
            written = await in_thread(self._tools.capture.documents, container)
            await in_long_thread(write_container, place.root / folder, written, _work_of(job, index))
        return await stoppable(place.flush)

    def _document(self, job: _Job, frozen: float) -> bytes:
        return describe(
            job.sandbox,
            job.containers,
            frozen_seconds=frozen,
            criu=self._tools.support.version,
            folders=job.folders,
        )


def _work_of(job: _Job, index: int) -> Path:
    """The folder in which CRIU writes its log."""
    return job.work / f"work-{index}"


def _save_files(job: _Job, saved: Sequence[archive.Saved], root: Path, check: Callable[[], None]) -> None:
    """Write the files of all containers, and once the shared memory of the pod. Blocks."""
    for each, folder in zip(saved, job.folders, strict=True):
        archive.save_files(archive.without_shared_memory(each), root / folder, check)
    shared = next((each.shared_memory for each in saved if each.shared_memory is not None), None)
    if shared is not None:
        archive.save_tree(shared, root / documents.SHARED_MEMORY, check)


def _refuse_busy(sandbox: Sandbox, containers: Sequence[Container]) -> None:
    if sandbox.checkpoint is not None:
        raise WrongStateError(f"{sandbox.title}: another checkpoint of it is being made: wait for its end")
    for container in containers:
        if container.checkpoint is not None:
            raise WrongStateError(f"{container.title}: a checkpoint of it is being made: wait for its end")


async def _sharing(work: asyncio.Task[int], sandbox: Sandbox) -> int:
    """The result of ``work``, which a stop of a container may cancel. The work ends with its caller."""
    try:
        await asyncio.wait((work,))
    except asyncio.CancelledError:
        work.cancel()
        await ended(work)
        raise
    if work.cancelled():
        raise WrongStateError(f"{sandbox.title}: one of its containers is being stopped: its checkpoint was cancelled")
    return work.result()


async def _all_or_none(works: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run all at once. If one fails or the caller is cancelled, the others are cancelled and waited for."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            await ended(task)
    for task in tasks:
        if not task.cancelled():
            task.result()
