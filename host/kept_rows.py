"""Copies of the store's rows in files. A lost store is restored from them.

The ``Place``s of an object say which rows belong to it. They are in the order in which their tables refer to each
other.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from host.errors import PodkeelError

_FILE_BYTES = 4 << 20


class Place(NamedTuple):
    """Rows of ``table`` that match ``condition``, an SQL expression in which ``?1`` is the object's id.

    If such a row is in the store already when it is restored, the columns ``newer`` are taken from the kept row.

    ``identified_by`` is for a table whose key is a number that the store assigned. It names the column that identifies
    the object. An older store may have assigned another number. Then the kept number is used, also in ``referring``, a
    table and a column.
    """

    table: str
    condition: str
    newer: tuple[str, ...] = ()
    identified_by: str = ""
    referring: tuple[str, str] = ("", "")


class _Rows(msgspec.Struct):
    table: str
    columns: list[str]
    rows: list[list[Any]]


def keep(connection: sqlite3.Connection, places: Sequence[Place], key: str, file: Path) -> bool:
    """Write an object's rows to ``file``, all or nothing. False if its folder is gone.

    Raises OSError, sqlite3.Error, and PodkeelError if the rows are too large.
    """
    found = []
    for place in places:
        cursor = connection.execute(f"SELECT * FROM {place.table} WHERE {place.condition}", (key,))
        columns = [column[0] for column in cursor.description]
        found.append(_Rows(place.table, columns, [list(row) for row in cursor]))
    content = msgspec.msgpack.encode(found)
    if len(content) > _FILE_BYTES:
        raise PodkeelError(f"its rows take {len(content)} bytes: the limit is {_FILE_BYTES}")
    made = file.with_name(f"{file.name}.new")
    try:
        made.write_bytes(content)
        made.chmod(0o600)
        made.replace(file)
    except FileNotFoundError:
        return False
    return True


def restore_rows(connection: sqlite3.Connection, places: Sequence[Place], file: Path) -> None:
    """Restore the rows of ``file`` in a store that may have some of them, all or nothing.

    Raises OSError, sqlite3.Error, and ValueError for a file that ``keep`` did not write.
    """
    known = {place.table: place for place in places}
    kept = _read(file)
    connection.execute("SAVEPOINT kept")
    try:
        for rows in kept:
            _insert(connection, known, rows)
    except BaseException:
        connection.execute("ROLLBACK TO kept")
        raise
    finally:
        connection.execute("RELEASE kept")


def kept_value(file: Path, table: str, column: str) -> object:
    """The value of a column in the first row of a table in ``file``; None if there is none."""
    try:
        rows = next(rows for rows in _read(file) if rows.table == table)
        return rows.rows[0][rows.columns.index(column)]
    except (OSError, ValueError, LookupError, StopIteration):
        return None


def _read(file: Path) -> list[_Rows]:
    with file.open("rb") as opened:
        return msgspec.msgpack.decode(opened.read(_FILE_BYTES + 1), type=list[_Rows])


def _insert(connection: sqlite3.Connection, known: Mapping[str, Place], rows: _Rows) -> None:
    place = known.get(rows.table)
    if place is None:
        raise ValueError(f"it has rows of the table {rows.table!r}")
    there = [row[1:6] for row in connection.execute(f"PRAGMA table_info({place.table})")]
    columns = [name for name, *_ in there if name in rows.columns]
    taken = [rows.columns.index(name) for name in columns]
    statement = f"INSERT OR IGNORE INTO {place.table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
    if place.newer:
        keys = ", ".join(name for name, _, _, _, in_key in there if in_key)
        changes = ", ".join(f"{name} = excluded.{name}" for name in place.newer)
        statement = statement.replace(" OR IGNORE", "") + f" ON CONFLICT ({keys}) DO UPDATE SET {changes}"
    for row in rows.rows:
        if len(row) != len(rows.columns):
            raise ValueError(f"a row of the table {rows.table!r} has {len(row)} values")
        if place.identified_by:
            key = next(name for name, _, _, _, in_key in there if in_key)
            if not {key, place.identified_by} <= set(rows.columns):
                raise ValueError(f"a row of the table {rows.table!r} has no {key} or no {place.identified_by}")
            number, value = (row[rows.columns.index(name)] for name in (key, place.identified_by))
            _give_number(connection, place, key, number, value)
        connection.execute(statement, [row[index] for index in taken])


def _give_number(connection: sqlite3.Connection, place: Place, key: str, number: object, value: object) -> None:
    """Change rows of the store so that the object with ``value`` has this number, and no other object has it."""
    table = place.table
    select = f"SELECT {key} FROM {table} WHERE"
    taken = connection.execute(f"{select} {key} = ? AND {place.identified_by} <> ?", (number, value)).fetchone()
    if taken is not None:
        (free,) = connection.execute(f"SELECT max({key}) + 1 FROM {table}").fetchone()
        _renumber(connection, place, key, number, free)
    other = connection.execute(f"{select} {place.identified_by} = ? AND {key} <> ?", (value, number)).fetchone()
    if other is not None:
        _renumber(connection, place, key, other[0], number)


def _renumber(connection: sqlite3.Connection, place: Place, key: str, old: object, new: object) -> None:
    """Change the key of a row. The rows that refer to it are deleted before and inserted after that."""
    table, column = place.referring
    cursor = connection.execute(f"SELECT * FROM {table} WHERE {column} = ?", (old,))
    columns = [name for name, *_ in cursor.description]
    referring = cursor.fetchall()
    connection.execute(f"DELETE FROM {table} WHERE {column} = ?", (old,))
    connection.execute(f"UPDATE {place.table} SET {key} = ? WHERE {key} = ?", (new, old))
    statement = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
    position = columns.index(column)
    for row in referring:
        connection.execute(statement, [*row[:position], new, *row[position + 1 :]])
