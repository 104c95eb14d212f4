"""Tables of sandboxes and containers. ``config`` is the CRI message from the client, ``record`` is Podkeel's data."""

from __future__ import annotations

from host.kept_rows import Place

SANDBOX_ROWS = Place("sandboxes", "id = ?1", newer=("record",))
CONTAINER_ROWS = Place("containers", "id = ?1", newer=("record",))

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE sandboxes (
        id TEXT PRIMARY KEY,
        created_at INTEGER NOT NULL,
        config BLOB NOT NULL,
        record BLOB NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE containers (
        id TEXT PRIMARY KEY,
        sandbox_id TEXT NOT NULL REFERENCES sandboxes (id),
        created_at INTEGER NOT NULL,
        config BLOB NOT NULL,
        record BLOB NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX containers_of_sandbox ON containers (sandbox_id);
    """,
)
