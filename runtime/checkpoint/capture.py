"""Saves one running container: freezes it, has CRIU write its processes, and finds its files."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import msgspec

from host.concurrency.threads import in_thread
from host.errors import CommandError, DeadlineError, NoSpaceError, WrongStateError
from images.snapshots.store import SnapshotStore
from proto.runtime.v1 import cri_pb2
from runtime.cgroups.tree import CgroupTree
from runtime.checkpoint import criu_log, documents
from runtime.checkpoint.archive import Saved
from runtime.checkpoint.criu_run import run_to_its_end
from runtime.checkpoint.options import CheckpointOptions
from runtime.checkpoint.support import CheckpointSupport
from runtime.layout import Layout
from runtime.oci.handlers import Handlers
from runtime.oci.oci_runtime import OciRuntime, plain_message
from runtime.specgen import config
from runtime.state.container import Container, ContainerState
from runtime.state.state import State

FREEZE_SECONDS = 10.0
_MAX_DELETED_FILE_BYTES = 64 << 20  # bytes of an open file that was deleted

_log = logging.getLogger("podkeel.checkpoint")


class Capture:
    """The steps of a checkpoint for one container."""

    def __init__(
        self, options: CheckpointOptions, support: CheckpointSupport, cgroups: CgroupTree, snapshots: SnapshotStore
    ) -> None:
        self._options = options
        self._support = support
        self._cgroups = cgroups
        self._snapshots = snapshots

    async def refuse_paused(self, container: Container) -> None:
        """Raise WrongStateError if another program has frozen the container, because a checkpoint would thaw it.

        Call this before ``freeze``.
        """
        if await in_thread(self._cgroups.is_frozen, container.record.cgroup):
            raise WrongStateError(f"{container.title} is paused: resume it first")

    async def freeze(self, container: Container) -> None:
        """Freeze a running container. The caller must thaw it, also after an error.

        Raises WrongStateError if it does not run, DeadlineError if it cannot be frozen.
        """
        require_running(container)
        path = container.record.cgroup
        if not await in_thread(self._cgroups.freeze, path, FREEZE_SECONDS):
            raise DeadlineError(f"{container.title} cannot be frozen: one of its processes waits in the kernel")

    async def dump(self, container: Container, runtime: OciRuntime, images: Path, work: Path) -> None:
        """Have CRIU write the processes of a frozen container to the new folder ``images``, and its log to ``work``.

        Raises WrongStateError with CRIU's reason, NoSpaceError, CommandError.
        """
        await in_thread(_prepare, work, self._support.closes_connections)
        words = ["checkpoint", "--image-path", str(images), "--work-path", str(work)]
        words += ["--leave-running", "--file-locks"]
        if not self._support.closes_connections:
            words.append("--tcp-established")
        words.append(container.id)
        command = runtime.command(*words)
        result = await run_to_its_end(command, self._support.environment(work / "criu.conf"), work / "output")
        if result.status == 0:
            return
        why = await in_thread(criu_log.reason, work / documents.CRIU_LOG)
        kept = await in_thread(criu_log.keep, work / documents.CRIU_LOG, self._options.failure_log_dir, container.id)
        require_running(container)
        if not why:
            raise CommandError(runtime.shown(*words), result.status, plain_message(result.output))
        kind = NoSpaceError if "No space left" in why else WrongStateError
        raise kind(f"{container.title} cannot be checkpointed: {why}{kept}")

    def saved(self, container: Container) -> Saved:
        """The paths of the container's files. Blocks."""
        volumes = self._snapshots.upper(container.id).parent / "volumes"
        shared = container.sandbox.namespace_options.ipc != cri_pb2.NODE
        return Saved(
            upper=self._snapshots.upper(container.id),
            lower=self._snapshots.lower(container.id),
            volumes={entry.name: entry for entry in volumes.iterdir()} if volumes.is_dir() else {},
            shared_memory=container.sandbox.folder.shm if shared else None,
        )

    def documents(self, container: Container) -> dict[str, bytes]:
        """The documents of an archive, by name. Blocks."""
        spec = container.folder.spec.read_bytes()
        mounts = msgspec.json.decode(spec, type=_Mounts).mounts
        return {
            documents.CONFIG: documents.config_dump(container),
            documents.SPEC: spec,
            documents.STATUS: documents.status_dump(container),
            documents.NETWORK: documents.network_status(container),
            documents.BIND_MOUNTS: documents.bind_mounts(mounts),
        }


class _Mounts(msgspec.Struct):
    mounts: list[config.Mount] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What checkpoints of containers and pods are made with."""

    capture: Capture
    support: CheckpointSupport
    state: State
    handlers: Handlers
    layout: Layout
    cgroups: CgroupTree


def require_running(container: Container) -> None:
    """Raise WrongStateError unless the container is running."""
    if container.record.state is not ContainerState.RUNNING or container.exited.is_set():
        raise WrongStateError(f"{container.title} is {container.record.state}: only a running one can be checkpointed")


def _prepare(work: Path, closes_connections: bool) -> None:
    work.mkdir(mode=0o700)
    # Connections that are left out need no lock, for which CRIU would run iptables while the container is frozen.
    lock = "network-lock skip\n" if closes_connections else ""
    (work / "criu.conf").write_text(f"tcp-close\n{lock}ghost-limit {_MAX_DELETED_FILE_BYTES}\n")
