"""The rows of layers in the store. Each function is one write, run on the database's thread."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Iterable

from images.content.layer_source import LayerSource
from images.layers.layer import Layer

# Values of the column ``ready``: being made; complete, but its pull may still fail; used by an image.
MAKING, NEW, USED = range(3)


def insert(connection: sqlite3.Connection, source: LayerSource) -> int:
    """Insert a row for a layer that is being made. Returns its number. ``complete`` sets its chain ID.

    Several rows may exist for the same layer, if several pulls make it.
    """
    cursor = connection.execute(
        "INSERT INTO layers (chain_id, diff_id, blob_digest, blob_bytes, used_bytes, used_inodes, opaque, ready) "
        "VALUES (?, ?, '', 0, 0, 0, 0, ?)",
        (f"making {secrets.token_hex(16)}", source.diff_id, MAKING),
    )
    number = cursor.lastrowid
    assert number is not None
    return number


def complete(connection: sqlite3.Connection, layer: Layer, *, resumable: bool) -> None:
    """Record the complete layer. ``resumable`` is that of its source."""
    # A removed layer whose row could not be deleted, because the disk was full.
    connection.execute("DELETE FROM layers WHERE chain_id = ? AND number != ?", (layer.chain_id, layer.number))
    connection.execute(
        "UPDATE layers SET chain_id = ?, blob_digest = ?, blob_bytes = ?, used_bytes = ?, used_inodes = ?, opaque = ?, "
        "tree_digest = ?, ready = ? WHERE number = ?",
        (
            layer.chain_id,
            layer.blob_digest,
            layer.blob_bytes,
            layer.used_bytes,
            layer.used_inodes,
            layer.opaque,
            layer.tree_digest,
            NEW if resumable else USED,
            layer.number,
        ),
    )


def mark_used(connection: sqlite3.Connection, numbers: Iterable[int]) -> None:
    """Record that an image uses these layers."""
    rows = [(USED, number) for number in numbers]
    connection.executemany("UPDATE layers SET ready = ? WHERE number = ?", rows)


def delete(connection: sqlite3.Connection, numbers: Iterable[int]) -> None:
    """Delete the rows of these layers. Missing ones are no error."""
    connection.executemany("DELETE FROM layers WHERE number = ?", [(number,) for number in numbers])


def delete_others(connection: sqlite3.Connection, known: set[int]) -> None:
    """Delete the rows of all layers except the known ones."""
    numbers = [row[0] for row in connection.execute("SELECT number FROM layers").fetchall()]
    delete(connection, [number for number in numbers if number not in known])


def retire(connection: sqlite3.Connection, layer: Layer) -> None:
    """Record the layer's new chain ID."""
    connection.execute("UPDATE layers SET chain_id = ? WHERE number = ?", (layer.chain_id, layer.number))


def forget_blob(connection: sqlite3.Connection, digest: str) -> None:
    """Record that the compressed blob is not kept any more."""
    connection.execute("UPDATE layers SET blob_digest = '' WHERE blob_digest = ?", (digest,))
