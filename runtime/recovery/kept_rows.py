"""Keeps the store's rows of each pod and container also in files of the run folder.

If the store is lost together with its copy, it is made again from them, as long as the node runs: pods and containers,
their images, layers and snapshots, attachments, addresses and host ports.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from host.concurrency.follower import Follower
from host.concurrency.threads import in_thread
from host.database import Database
from host.errors import PodkeelError
from host.kept_rows import Place, keep, kept_value, restore_rows
from images.schema import ROWS_OF_CONTAINER as IMAGE_ROWS
from network.schema import ROWS_OF_SANDBOX as NETWORK_ROWS
from runtime.layout import Layout
from runtime.state.container import Container, ContainerState
from runtime.state.sandbox import Sandbox, SandboxState
from runtime.state.schema import CONTAINER_ROWS, SANDBOX_ROWS
from runtime.state.truncindex import is_id

OF_SANDBOX: tuple[Place, ...] = (SANDBOX_ROWS, *NETWORK_ROWS)
OF_CONTAINER: tuple[Place, ...] = (*IMAGE_ROWS, CONTAINER_ROWS)
# Changes that follow soon after each other are written once.
_DELAY_SECONDS = 0.2
_KEPT = (SandboxState.READY, ContainerState.CREATED, ContainerState.RUNNING, ContainerState.EXITED)

_log = logging.getLogger("podkeel.store")


class KeptRows:
    """Writes the files after changes of pods and containers in the store, in the background. For use on the loop."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._changed: dict[Path, tuple[Sequence[Place], str]] = {}
        self._writing: dict[Path, tuple[Sequence[Place], str]] = {}
        self._wake = asyncio.Event()
        self._follower = Follower(self._wake, _DELAY_SECONDS, self._write)
        self._failed = False

    def note(self, changed: Sandbox | Container) -> None:
        """A row of this pod or container was written. It is ignored if its folder is about to be removed."""
        if isinstance(changed, Sandbox):
            file, places = changed.folder.kept_rows, OF_SANDBOX
        else:
            file, places = changed.folder.kept_rows, OF_CONTAINER
        if changed.record.state in _KEPT:
            self._changed[file] = places, changed.id
            self._wake.set()
        else:
            self._leave(file)

    def _leave(self, file: Path) -> None:
        self._changed.pop(file, None)
        self._writing.pop(file, None)  # a thread takes one entry after the other out

    def start(self, known: Iterable[Sandbox | Container]) -> None:
        """Begin, with all pods and containers that are known now."""
        for one in known:
            self.note(one)
        self._follower.start()

    async def close(self) -> None:
        """Write the last changes, and stop."""
        await self._follower.close()

    async def _write(self) -> float:
        self._writing, self._changed = self._changed, {}
        errors = await in_thread(self._write_files, self._writing)
        if errors and not self._failed:
            _log.warning(
                "store: rows of %d pods and containers cannot be written to the run folder: %s", len(errors), errors[0]
            )
        self._failed = bool(errors)
        return 0.0

    def _write_files(self, writing: dict[Path, tuple[Sequence[Place], str]]) -> list[str]:
        errors = []
        with contextlib.closing(sqlite3.connect(self._database.path, isolation_level=None)) as connection:
            while writing:
                try:
                    file, (places, key) = writing.popitem()
                except KeyError:  # the last object is being removed
                    break
                try:
                    keep(connection, places, key, file)
                except (OSError, sqlite3.Error, PodkeelError) as error:
                    errors.append(f"{file}: {error}")
        return errors


def kept_containers(layout: Layout) -> frozenset[str]:
    """The containers of which the run folder has the rows, and the rows of their pods."""
    sandboxes = {file.parent.name for file in _files(layout.sandboxes)}
    pods = {
        file.parent.name: kept_value(file, CONTAINER_ROWS.table, "sandbox_id") for file in _files(layout.containers)
    }
    return frozenset(container_id for container_id, sandbox_id in pods.items() if sandbox_id in sandboxes)


async def restore_all_rows(database: Database, layout: Layout) -> None:
    """Restore all rows in the run folder to the store. Rows that cannot be stored are logged and left out."""

    def work(connection: sqlite3.Connection) -> int:
        count = 0
        for folder, places in ((layout.sandboxes, OF_SANDBOX), (layout.containers, OF_CONTAINER)):
            for file in _files(folder):
                try:
                    restore_rows(connection, places, file)
                    count += 1
                except (OSError, sqlite3.DatabaseError, ValueError, OverflowError) as error:
                    if not connection.in_transaction:  # the disk is full
                        raise
                    _log.error("store: %s: cannot be restored: %s", file, error)
        return count

    count = await database.write(work)
    _log.warning("store: restored %d pods and containers from the run folder", count)


def _files(folder: Path) -> Iterator[Path]:
    """The files of rows in the folders of pods or of containers."""
    for one in sorted(folder.iterdir()) if folder.is_dir() else ():
        if is_id(one.name) and (one / "rows").is_file():
            yield one / "rows"
