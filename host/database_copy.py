"""Keeps a copy of the store beside it. The agent can start from the copy if the store is lost or damaged."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sqlite3
import time
from pathlib import Path

from host.concurrency.follower import Follower
from host.concurrency.threads import in_long_thread
from host.database import Database

# A copy is made this long after a change, when the operation that made the change has probably ended. If changes
# continue, copies are not made more often.
_DELAY_SECONDS = 0.3
_BYTES_PER_SECOND = 1_000_000
# Errors that do not mean a damaged file. The next caller that opens the file gets them too.
_PRIMARY_CODE = 0xFF
_NOT_DAMAGE = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_CANTOPEN)

_log = logging.getLogger("podkeel.store")


class DatabaseCopy:
    """Keeps ``path`` up to date with ``database``, except for changes of the last seconds."""

    def __init__(self, database: Database, path: Path) -> None:
        self._database = database
        self._path = path
        self._follower = Follower(database.changed, _DELAY_SECONDS, self._copy)
        self._failed = False

    def start(self) -> None:
        """Make the first copy now, and then follow changes."""
        self._database.changed.set()
        self._follower.start()

    async def close(self) -> None:
        """Copy the last changes, and stop."""
        await self._follower.close()

    async def _copy(self) -> float:
        try:
            size = await in_long_thread(copy_database, self._database.path, self._path)
        except (OSError, sqlite3.Error) as error:
            if not self._failed:
                _log.warning("store copy %s: cannot be written: %s", self._path, error)
            self._failed = True
            return 0.0
        self._failed = False
        return size / _BYTES_PER_SECOND


def copy_database(source: Path, target: Path) -> int:
    """Make ``target`` a copy of the database ``source``, all or nothing. Returns its number of bytes.

    ``source`` can be read and written meanwhile. Blocks. Raises OSError or sqlite3.Error.
    """
    made = target.with_name(f"{target.name}.new")
    made.unlink(missing_ok=True)
    try:
        os.close(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        with (
            contextlib.closing(sqlite3.connect(f"{source.as_uri()}?mode=ro", uri=True)) as here,
            contextlib.closing(sqlite3.connect(made)) as there,
        ):
            there.execute("PRAGMA synchronous=OFF")
            here.backup(there)
        made.replace(target)
    except BaseException:
        made.unlink(missing_ok=True)
        raise
    return target.stat().st_size


def problem_of(path: Path) -> str:
    """The problem of a database file: ``missing``, ``empty``, or SQLite's message. An empty text if it is sound."""
    if not path.exists():
        return "missing"
    if path.stat().st_size == 0:
        return "empty"
    try:
        with contextlib.closing(open_read_only(path)) as connection:
            (answer,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    except sqlite3.DatabaseError as error:
        unknown = getattr(error, "sqlite_errorcode", 0) & _PRIMARY_CODE in _NOT_DAMAGE
        return "" if unknown else f"damaged ({error})"
    if answer != "ok":
        return f"damaged ({' '.join(str(answer).split())})"
    return "" if tables else "empty"


def open_read_only(path: Path) -> sqlite3.Connection:
    """A read-only connection.

    A database without a write-ahead log can also be read on a full disk. If the header of a database says that it has
    such a log, SQLite creates files beside it. The header of a copy says so.
    """
    log = path.with_name(f"{path.name}-wal")
    alone = not (log.exists() and log.stat().st_size)
    return sqlite3.connect(f"{path.as_uri()}?mode={'ro&immutable=1' if alone else 'rw'}", uri=True)


def put_in_place(copy: Path, path: Path) -> Path | None:
    """Make ``path`` a copy of the database ``copy``. An existing file is renamed, and its new name returned.

    Blocks. If a step fails, nothing has changed. Raises OSError.
    """
    made = path.with_name(f"{path.name}.new")
    try:
        shutil.copyfile(copy, made)
        made.chmod(0o600)
        aside = set_file_aside(path)
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)
    return aside


def set_file_aside(path: Path) -> Path | None:
    """Rename a database and the files that belong to it. The new name has the time; None if there is no database."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    aside = path.with_name(f"{path.name}.{stamp}")
    for ending in ("-wal", "-shm", ""):
        file = path.with_name(f"{path.name}{ending}")
        if file.exists():
            file.rename(aside.with_name(f"{aside.name}{ending}"))
    return aside if aside.exists() else None
