"""The SQLite file with all durable state. One thread writes it.

Writes that wait at the same time share one commit. Each runs in its own savepoint, so that a failed write does not undo
the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from host import libc
from host.concurrency.tasks import wait_out
from host.errors import NoSpaceError, PodkeelError, WrongStateError
from host.files import set_aside
from host.files.set_aside import SetAside, UnreadableRow

T = TypeVar("T")

_GROUP = 64
_MORE_BYTES = 1 << 20  # for rows
_LOG_BYTES = 6 << 20  # SQLite begins its write-ahead log again after 4 MiB


@dataclass(slots=True)
class _Write:
    work: Callable[[sqlite3.Connection], Any]
    future: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop
    value: Any = None
    error: BaseException | None = None


class Database:
    """Opens the file, migrates every room's tables to the newest version, and runs reads and writes.

    ``schemas`` maps a room's name to its migrations, oldest first. Each is a script that runs once. Raises
    WrongStateError if the file has more migrations than this program knows: a newer version wrote it.
    """

    def __init__(self, path: Path, schemas: Mapping[str, Sequence[str]]) -> None:
        self.path = path
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        path.touch(mode=0o600)
        _reserve_space(
            path, path.stat().st_size + _MORE_BYTES
        )  # before SQLite locks it: a close here would end the lock
        path.chmod(0o600)  # it has the environment of containers; SQLite's other files get the same mode
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        try:
            self._connection.executescript(
                "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA foreign_keys=ON; PRAGMA busy_timeout=5000;"
            )
            _migrate(self._connection, schemas, path)
        except BaseException as error:
            self._connection.close()
            if isinstance(error, sqlite3.DatabaseError):
                raise _described(path, error) from error
            raise
        _reserve_space(path.with_name(f"{path.name}-wal"), _LOG_BYTES)
        self.commits = 0
        self.changed = asyncio.Event()
        self._thread = threading.Thread(target=self._serve, name="database", daemon=True)
        self._thread.start()

    async def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run ``work`` on the writer thread. Returns its result once it is committed.

        A cancelled caller waits for the commit (well under a millisecond), so that the outcome is known. Raises the
        error of ``work``, NoSpaceError when the disk is full, and PodkeelError for any other error of the commit.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._queue.put(_Write(work, future, loop))
        try:
            return await wait_out(future)
        finally:
            self.changed.set()

    async def execute(self, statement: str, parameters: Sequence[object] = ()) -> None:
        """Run one statement that writes."""
        await self.write(lambda connection: connection.execute(statement, parameters) and None)

    def read(self, statement: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """All rows of a query, read on a separate connection.

        Only for the start and for checks, never inside a call. Bytes that are not UTF-8 become surrogates, as in names
        of files. Raises WrongStateError for a damaged store.
        """
        try:
            with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
                connection.text_factory = os.fsdecode
                return connection.execute(statement, parameters).fetchall()
        except sqlite3.OperationalError as error:
            raise _described(self.path, error) from error
        except sqlite3.DatabaseError as error:
            raise WrongStateError(f"store {self.path} is damaged: {error}") from error

    def set_rows_aside(self, rows: Sequence[UnreadableRow], *places: tuple[str, str]) -> None:
        """Move rows to the table ``set_aside``, and delete them from ``places``.

        A place is a table and a condition for its rows; tables that refer to others come first. Blocks. Only for the
        start.
        """
        if not rows:
            return
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
            connection.executescript("PRAGMA foreign_keys=ON; PRAGMA busy_timeout=5000; BEGIN IMMEDIATE;")
            set_aside.keep(connection, rows)
            for table, column in places:
                for row in rows:
                    condition, values = set_aside.key_is(column, row.key)
                    connection.execute(f"DELETE FROM {table} WHERE {condition}", values)
            connection.execute("COMMIT")

    def set_asides(self) -> list[SetAside]:
        """The rows that were moved to ``set_aside`` because they could not be read."""
        return [SetAside(*row) for row in self.read("SELECT kind, object, reason FROM set_aside ORDER BY at")]

    async def forget_set_asides(self) -> None:
        """Delete the rows in ``set_aside``."""
        await self.execute("DELETE FROM set_aside")

    def close(self) -> None:
        """Complete the waiting writes, then close the file."""
        self._queue.put(None)
        self._thread.join()
        self._connection.close()

    def _serve(self) -> None:
        while True:
            first = self._queue.get()
            if first is None:
                return
            group = [first]
            last = False
            while len(group) < _GROUP:
                try:
                    item = self._queue.get_nowait()
                except queue.Empty:
                    break
                if item is None:
                    last = True
                    break
                group.append(item)
            self._commit(group)
            if last:
                return

    def _commit(self, group: list[_Write]) -> None:
        connection = self._connection
        try:
            connection.execute("BEGIN IMMEDIATE")
            for write in group:
                connection.execute("SAVEPOINT one")
                try:
                    write.value = write.work(connection)
                except BaseException as error:
                    write.error = error
                    if not connection.in_transaction:  # SQLite ends the whole transaction if the disk is full
                        raise
                    connection.execute("ROLLBACK TO one")
                connection.execute("RELEASE one")
            connection.execute("COMMIT")
            self.commits += 1
        except BaseException as error:  # any error: the waiting callers get it, and later callers must be served
            if connection.in_transaction:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
            for write in group:
                write.error = write.error or error
        loops: dict[asyncio.AbstractEventLoop, list[_Write]] = {}
        for write in group:
            if isinstance(write.error, sqlite3.DatabaseError):
                failed = _described(self.path, write.error)
                failed.__cause__ = write.error
                write.error = failed
            loops.setdefault(write.loop, []).append(write)
        for loop, writes in loops.items():
            with contextlib.suppress(RuntimeError):  # the loop ended during the write: its callers are gone
                loop.call_soon_threadsafe(_settle, writes)


def _reserve_space(file: Path, size: int) -> None:
    """Reserve disk space for so many bytes of the file, because rows must be deletable on a full disk.

    If the disk is full now, or its file system cannot reserve space, nothing changes.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
        try:
            libc.reserve_space(descriptor, size)
        finally:
            os.close(descriptor)


def _described(path: Path, error: sqlite3.DatabaseError) -> PodkeelError:
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
        return NoSpaceError(f"store {path} could not be written: its file system is full: free space on it")
    return PodkeelError(f"store {path} could not be read or written: {error}")


def _settle(writes: list[_Write]) -> None:
    for write in writes:
        if write.future.done():
            continue
        if write.error is not None:
            write.future.set_exception(write.error)
        else:
            write.future.set_result(write.value)


def _migrate(connection: sqlite3.Connection, schemas: Mapping[str, Sequence[str]], path: Path) -> None:
    connection.execute(set_aside.TABLE)
    connection.execute("CREATE TABLE IF NOT EXISTS schema_versions (room TEXT PRIMARY KEY, version INTEGER NOT NULL)")
    known: dict[str, int] = dict(connection.execute("SELECT room, version FROM schema_versions").fetchall())
    for room, version in known.items():
        newest = len(schemas.get(room, ()))
        if version > newest:
            raise WrongStateError(
                f"data folder {path.parent} was written by a newer Podkeel ({room} tables are at version {version}, "
                f"this one knows {newest}): start that version, or use another data folder"
            )
    for room, migrations in schemas.items():
        for number, script in enumerate(migrations[known.get(room, 0) :], start=known.get(room, 0) + 1):
            connection.executescript(
                f"BEGIN; {script}; INSERT OR REPLACE INTO schema_versions VALUES ('{room}', {number}); COMMIT;"
            )
