"""Rows of the store that cannot be read. They are moved to a separate table, so that the rest of the store works."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import time
from collections.abc import Sequence
from typing import NamedTuple

from host.errors import printable

TABLE = """
CREATE TABLE IF NOT EXISTS set_aside (
    kind TEXT NOT NULL,
    object TEXT NOT NULL,
    reason TEXT NOT NULL,
    at INTEGER NOT NULL,                -- seconds since the epoch
    columns TEXT NOT NULL               -- what the row held, as a JSON list; bytes in hexadecimal
)
"""

_log = logging.getLogger("podkeel.store")


class UnreadableRow(NamedTuple):
    """A row that cannot be read: the ``kind`` of object, its key in the database, the reason, and the row's values."""

    kind: str
    key: object
    reason: str
    columns: Sequence[object]

    @property
    def object(self) -> str:
        """The key as text."""
        key = os.fsdecode(self.key) if isinstance(self.key, bytes) else str(self.key)
        return printable(key)


class SetAside(NamedTuple):
    """The report on such a row."""

    kind: str
    object: str
    reason: str


def keep(connection: sqlite3.Connection, rows: Sequence[UnreadableRow]) -> None:
    """Copy rows to the table ``set_aside``. The caller deletes them from their tables in the same transaction."""
    for row in rows:
        columns = json.dumps([_plain(value) for value in row.columns])
        values = (row.kind, row.object, printable(row.reason), int(time.time()), columns)
        connection.execute("INSERT INTO set_aside VALUES (?, ?, ?, ?, ?)", values)
        _log.error("%s %s: set aside: its row in the store cannot be read: %s", row.kind, row.object, row.reason)


def key_is(column: str, key: object) -> tuple[str, tuple[object]]:
    """A condition that selects the row with exactly this key, of any type and with any bytes."""
    if isinstance(key, str):
        return f"{column} = CAST(? AS TEXT)", (os.fsencode(key),)
    return f"{column} IS ?", (key,)


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return value.hex()
    return printable(value) if isinstance(value, str) else value
