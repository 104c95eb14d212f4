"""The writer thread of the store."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest

from host.database import Database


def test_a_write_that_ends_the_transaction_and_fails_stops_no_other(tmp_path: Path) -> None:
    def break_off(connection: sqlite3.Connection) -> None:
        connection.execute("ROLLBACK")
        raise ValueError("broken off")

    async def body() -> None:
        failing = asyncio.ensure_future(database.write(break_off))
        await asyncio.wait([failing], timeout=5)
        assert failing.done()
        with pytest.raises(ValueError, match="broken off"):
            await failing
        await database.execute("INSERT INTO things VALUES (1)")

    database = Database(tmp_path / "store.db", {"room": ("CREATE TABLE things (number INTEGER)",)})
    asyncio.run(body())
    database.close()
    assert sqlite3.connect(tmp_path / "store.db").execute("SELECT * FROM things").fetchall() == [(1,)]
