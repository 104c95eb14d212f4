"""CheckpointContainer: a running container is frozen, saved to an archive, and continues (KEP-2008)."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
import time
from functools import partial
from pathlib import Path

import msgspec

from host.concurrency.tasks import ended, wait_out
from host.concurrency.threads import in_fresh_thread, in_long_thread, in_thread
from host.concurrency.undo import Undo
from host.errors import (
    CommandError,
    DeadlineError,
    InvalidArgumentError,
    NoSpaceError,
    NotFoundError,
    UnsupportedError,
    WrongStateError,
)
from host.stages import Operation
from images.snapshots.store import SnapshotStore
from proto.runtime.v1 import cri_pb2
from runtime.cgroups.tree import CgroupTree
from runtime.checkpoint import archive, criu_log, documents, interrupted
from runtime.checkpoint.criu_run import run_to_its_end
from runtime.checkpoint.long_work import stoppable
from runtime.checkpoint.options import CheckpointOptions
from runtime.checkpoint.support import CheckpointSupport
from runtime.layout import Layout
from runtime.oci.handlers import Handlers
from runtime.oci.oci_runtime import OciRuntime, plain_message
from runtime.specgen import config
from runtime.state.container import Container, ContainerState
from runtime.state.state import State
from runtime.state.transitions import of_container

FREEZE_SECONDS = 10.0
_LARGEST_DELETED_FILE = 64 << 20  # bytes of an open file that has no name any more

_log = logging.getLogger("podkeel.checkpoint")


class Checkpoints:
    """Makes checkpoints of containers. One container has one checkpoint made at a time."""

    def __init__(
        self,
        options: CheckpointOptions,
        support: CheckpointSupport,
        *,
        state: State,
        handlers: Handlers,
        layout: Layout,
        cgroups: CgroupTree,
        snapshots: SnapshotStore,
    ) -> None:
        self._options = options
        self._support = support
        self._state = state
        self._handlers = handlers
        self._layout = layout
        self._cgroups = cgroups
        self._snapshots = snapshots

    async def checkpoint(self, container_id: str, location: str, seconds: float = 0) -> int:
        """Write a running container to the new file ``location``, a tar file of mode 0600; returns its size in bytes.

        The container is frozen while it is saved, and then continues. After ``seconds`` (0: no limit) the checkpoint is
        cancelled. After any error no file is left and the container runs.

        Raises:
            NotFoundError: there is no such container, or no folder for the file.
            InvalidArgumentError: ``location`` is no absolute path of a file, or ``seconds`` is negative.
            WrongStateError: the container does not run, is paused, or is being checkpointed.
            UnsupportedError: its handler cannot make checkpoints here, or it has something that cannot be saved.
            DeadlineError: it took too long.
        """
        container = self._state.get_container(container_id)
        target = _checked(container, location, seconds)
        if container.checkpoint is not None:
            raise WrongStateError(f"{container.title}: another checkpoint of it is being made: wait for its end")
        _require_running(container)
        runtime = self._handlers.find(container.record.handler)
        await self._support.require(runtime, container.record.handler)
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
                f"{container.title}: the checkpoint was not complete within {seconds:g} s: the container runs on, "
                "nothing was written; give more time"
            ) from error
        finally:
            container.checkpoint = None

    async def _checkpoint(self, container: Container, runtime: OciRuntime, target: Path) -> int:
        operation = container.begin("CheckpointContainer")
        folder = self._layout.checkpoints / container.id
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
        # The archive is complete: the rest of the work is short.
        await wait_out(asyncio.ensure_future(in_long_thread(interrupted.remove, folder)))
        extra = of_container(container, operation)
        _log.info("%s: checkpointed: %d bytes, frozen for %.0f ms", container.title, size, frozen * 1e3, extra=extra)
        return size

    async def _save(self, container: Container, runtime: OciRuntime, folder: Path, operation: Operation) -> float:
        """Save processes and files while the container is frozen; returns for how many seconds it was."""
        saved = self._saved(container)
        begin = time.perf_counter()
        async with Undo(container.title) as undo:
            undo.push("its being frozen", partial(in_thread, self._cgroups.thaw, container.record.cgroup))
            async with operation.stage("freeze"):
                await self._freeze(container)
            async with operation.stage("dump"):
                await self._dump(container, runtime, folder)
            async with operation.stage("files"):
                await stoppable(partial(archive.save_files, saved, folder))
            async with operation.stage("thaw"):
                await in_thread(self._cgroups.thaw, container.record.cgroup)
        return time.perf_counter() - begin

    async def _freeze(self, container: Container) -> None:
        _require_running(container)
        path = container.record.cgroup
        if await in_thread(self._cgroups.is_frozen, path):
            raise WrongStateError(f"{container.title} is paused: resume it first")
        if not await in_thread(self._cgroups.freeze, path, FREEZE_SECONDS):
            raise DeadlineError(f"{container.title} cannot be frozen: a process of it waits in the kernel")

    async def _dump(self, container: Container, runtime: OciRuntime, folder: Path) -> None:
        work = folder / "work"
        await in_thread(_prepare, work)
        words = ["checkpoint", "--image-path", str(folder / documents.IMAGES), "--work-path", str(work)]
        words += ["--leave-running", "--file-locks"]
        if not self._support.closes_connections:
            words.append("--tcp-established")
        command = runtime.command(*words, container.id)
        result = await run_to_its_end(command, self._support.environment(work / "criu.conf"), work / "output")
        if result.status == 0:
            return
        why = await in_thread(criu_log.reason, work / documents.CRIU_LOG)
        kept = await in_thread(self._keep_log, work / documents.CRIU_LOG, container)
        _require_running(container)
        if not why:
            raise CommandError(command, result.status, plain_message(result.output))
        kind = NoSpaceError if "No space left" in why else WrongStateError
        raise kind(f"{container.title} cannot be checkpointed: {why}{kept}")

    def _keep_log(self, log: Path, container: Container) -> str:
        """Keep CRIU's log if that is configured; returns the words about it for the error."""
        if not self._options.failure_log_dir:
            return ""
        kept = Path(self._options.failure_log_dir) / f"{container.id}-{time.time_ns()}-dump.log"
        try:
            kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(kept, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with log.open("rb") as source, os.fdopen(descriptor, "wb") as file:
                shutil.copyfileobj(source, file)
        except OSError as error:
            _log.warning("%s: CRIU's log could not be kept: %s", container.title, error)
            return ""
        return f"; its log is {kept}"

    def _saved(self, container: Container) -> archive.Saved:
        volumes = self._snapshots.upper(container.id).parent / "volumes"
        shared = container.sandbox.namespace_options.ipc != cri_pb2.NODE
        return archive.Saved(
            upper=self._snapshots.upper(container.id),
            lower=self._snapshots.lower(container.id),
            volumes={entry.name: entry for entry in volumes.iterdir()} if volumes.is_dir() else {},
            shared_memory=container.sandbox.folder.shm if shared else None,
        )

    async def _write(self, container: Container, folder: Path, partial_file: Path) -> int:
        spec = await in_thread(container.folder.spec.read_bytes)
        mounts = msgspec.json.decode(spec, type=_Mounts).mounts
        written = {
            documents.CONFIG: documents.config_dump(container),
            documents.SPEC: spec,
            documents.STATUS: documents.status_dump(container),
            documents.NETWORK: documents.network_status(container),
            documents.BIND_MOUNTS: await in_thread(documents.bind_mounts, mounts),
        }
        log = Path(container.record.log_path) if container.record.log_path else None
        return await stoppable(partial(archive.write_archive, folder, written, log, partial_file))


class _Mounts(msgspec.Struct):
    mounts: list[config.Mount] = []


async def _sharing(work: asyncio.Task[int]) -> int:
    """The result of ``work``, which a stop of the container may cancel too; it ends with its caller."""
    try:
        await asyncio.wait((work,))
    except asyncio.CancelledError:
        work.cancel()
        await ended(work)
        raise
    if work.cancelled():
        raise WrongStateError("the container is being stopped: its checkpoint was given up")
    return work.result()


def _checked(container: Container, location: str, seconds: float) -> Path:
    if seconds < 0:
        raise InvalidArgumentError(f"checkpoint of {container.title}: the timeout is negative")
    path = Path(location)
    if not path.is_absolute() or "\0" in location or location.endswith("/"):
        raise InvalidArgumentError(
            f"checkpoint of {container.title}: location {location!r} is no absolute path of a file on the node"
        )
    return path


def _check_place(container: Container, target: Path) -> None:
    """In a separate thread: the folder may be on a file system whose server does not answer."""
    if not target.parent.is_dir():
        raise NotFoundError(f"checkpoint of {container.title}: folder {target.parent} does not exist")
    if target.is_symlink() or (target.exists() and not target.is_file()):
        raise InvalidArgumentError(f"checkpoint of {container.title}: {target} is no file that could be replaced")


def _require_running(container: Container) -> None:
    if container.record.state is not ContainerState.RUNNING or container.exited.is_set():
        raise WrongStateError(f"{container.title} is {container.record.state}: only a running one can be checkpointed")


def _refuse_unsupported(container: Container) -> None:
    if container.sandbox.user_namespace:
        raise UnsupportedError(f"{container.title}: containers in user namespaces cannot be checkpointed")
    if container.config.tty:
        raise UnsupportedError(f"{container.title}: containers with a terminal cannot be checkpointed")


def _prepare(work: Path) -> None:
    work.mkdir(mode=0o700)
    (work / "criu.conf").write_text(f"tcp-close\nghost-limit {_LARGEST_DELETED_FILE}\n")
