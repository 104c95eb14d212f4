"""CheckpointContainer: a running container is frozen, saved to an archive, and continues (KEP-2008)."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from functools import partial
from pathlib import Path

from host.concurrency.tasks import ended, uninterrupted
from host.concurrency.threads import in_fresh_thread, in_long_thread, in_thread
from host.concurrency.undo import Undo
from host.errors import DeadlineError, InvalidArgumentError, NotFoundError, UnsupportedError, WrongStateError
from host.stages import Operation
from runtime.checkpoint import archive, documents, interrupted
from runtime.checkpoint.capture import Tools, require_running
from runtime.checkpoint.long_work import stoppable
from runtime.oci.oci_runtime import OciRuntime
from runtime.state.container import Container
from runtime.state.transitions import of_container

_log = logging.getLogger("podkeel.checkpoint")


class Checkpoints:
    """Makes checkpoints of containers. A container can have only one checkpoint made at a time."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    async def checkpoint(self, container_id: str, location: str, seconds: float = 0) -> int:
        """Write a running container to the new file ``location``, a tar file of mode 0600. Returns its size in bytes.

        The container is frozen while it is saved, and then continues. After ``seconds`` (0: no limit) the checkpoint is
        cancelled. After any error no file is left and the container runs.

        Raises:
            NotFoundError: there is no such container, or no folder for the file.
            InvalidArgumentError: ``location`` is not an absolute path of a file, or ``seconds`` is negative.
            WrongStateError: the container does not run, is paused, or is being checkpointed.
            UnsupportedError: its handler cannot make checkpoints here, or a part of it cannot be saved.
            DeadlineError: it took too long.
        """
        container = self._tools.state.get_container(container_id)
        target = _checked(container, location, seconds)
        if container.checkpoint is not None:
            raise WrongStateError(f"{container.title}: another checkpoint of it is being made: wait for its end")
        require_running(container)
        runtime = self._tools.handlers.find(container.record.handler)
        await self._tools.support.require(runtime, container.record.handler)
        assert runtime is not None
        _refuse_unsupported(container)
        if container.checkpoint is not None:
            raise WrongStateError(f"{container.title}: another checkpoint of it is being made: wait for its end")
        work = asyncio.create_task(self._checkpoint(container, runtime, target))
        container.checkpoint = work
        try:
            async with asyncio.timeout(seconds or None):
                return await _sharing(work)
        except TimeoutError as error:
            raise DeadlineError(
                f"{container.title}: the checkpoint was not complete within {seconds:g} s: nothing was written and the "
                "container continues; use a longer timeout"
            ) from error
        finally:
            container.checkpoint = None

    async def _checkpoint(self, container: Container, runtime: OciRuntime, target: Path) -> int:
        operation = container.begin("CheckpointContainer")
        folder = self._tools.layout.checkpoints / container.id
        partial_file = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}")
        await in_fresh_thread(_check_place, container, target)
        async with Undo(container.title) as undo:
            undo.push("the files of its checkpoint", partial(in_long_thread, interrupted.remove, folder))
            async with operation.stage("reserve"):
                await in_thread(interrupted.begin, folder, partial_file)
            frozen = await self._save(container, runtime, folder, operation)
            async with operation.stage("archive"):
                size = await self._write(container, folder, partial_file)
            async with operation.stage("commit"):
                await in_thread(archive.publish, partial_file, target)
        # The archive is complete: the remaining work is short.
        await uninterrupted(in_long_thread(interrupted.remove, folder))
        extra = of_container(container, operation)
        _log.info("%s: checkpointed: %d bytes, frozen for %.0f ms", container.title, size, frozen * 1e3, extra=extra)
        return size

    async def _save(self, container: Container, runtime: OciRuntime, folder: Path, operation: Operation) -> float:
        """Save processes and files while the container is frozen; returns for how many seconds it was."""
        saved = self._tools.capture.saved(container)
        await self._tools.capture.refuse_paused(container)
        begin = time.perf_counter()
        async with Undo(container.title) as undo:
            undo.push("its being frozen", partial(in_thread, self._tools.cgroups.thaw, container.record.cgroup))
            async with operation.stage("freeze"):
                await self._tools.capture.freeze(container)
            async with operation.stage("dump"):
                await self._tools.capture.dump(container, runtime, folder / documents.IMAGES, folder / "work")
            async with operation.stage("files"):
                await stoppable(partial(archive.save_files, saved, folder))
            async with operation.stage("thaw"):
                await in_thread(self._tools.cgroups.thaw, container.record.cgroup)
        return time.perf_counter() - begin

    async def _write(self, container: Container, folder: Path, partial_file: Path) -> int:
        written = await in_thread(self._tools.capture.documents, container)
        log = Path(container.record.log_path) if container.record.log_path else None
        return await stoppable(partial(archive.write_archive, folder, written, log, partial_file))


async def _sharing(work: asyncio.Task[int]) -> int:
    """The result of ``work``, which a stop of the container may cancel. The work ends with its caller."""
    try:
        await asyncio.wait((work,))
    except asyncio.CancelledError:
        work.cancel()
        await ended(work)
        raise
    if work.cancelled():
        raise WrongStateError("the container is being stopped: its checkpoint was cancelled")
    return work.result()


def _checked(container: Container, location: str, seconds: float) -> Path:
    if seconds < 0:
        raise InvalidArgumentError(f"checkpoint of {container.title}: the timeout is negative: use 0 or more seconds")
    path = Path(location)
    if not path.is_absolute() or "\0" in location or location.endswith("/"):
        raise InvalidArgumentError(
            f"checkpoint of {container.title}: location {location!r} is not an absolute path of a file on the node"
        )
    return path


def _check_place(container: Container, target: Path) -> None:
    """Check the folder and the file. Runs in a separate thread: the folder may be on a server that does not answer."""
    if not target.parent.is_dir():
        raise NotFoundError(f"checkpoint of {container.title}: folder {target.parent} does not exist")
    if target.is_symlink() or (target.exists() and not target.is_file()):
        raise InvalidArgumentError(f"checkpoint of {container.title}: {target} is not a file that can be replaced")


def _refuse_unsupported(container: Container) -> None:
    if container.sandbox.user_namespace:
        raise UnsupportedError(f"{container.title}: containers in user namespaces cannot be checkpointed")
    if container.config.tty:
        raise UnsupportedError(f"{container.title}: containers with a terminal cannot be checkpointed")
