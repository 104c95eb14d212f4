"""The rows of images in the store. Each function is one write, run on the database's thread."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Sequence

from host.database import Database
from host.errors import PodkeelError
from host.files.set_aside import UnreadableRow
from images.content.source import Candidate
from images.image import ConfigFile, read_config
from images.layers import layer_rows
from images.layers.layer import Layer


def readable(database: Database) -> list[tuple[str, str, int, ConfigFile]]:
    """Id, digest and length of the manifest, and configuration of each image. Sets invalid rows aside."""
    found: list[tuple[str, str, int, ConfigFile]] = []
    unreadable: list[UnreadableRow] = []
    columns = "id, manifest_digest, length(manifest), config"
    for row in database.read(f"SELECT {columns} FROM images ORDER BY created"):
        try:
            found.append((row[0], row[1], row[2], read_config(row[3], row[0])))
        except (PodkeelError, ValueError, TypeError) as error:
            unreadable.append(UnreadableRow("image", row[0], str(error), row))
    database.set_rows_aside(
        unreadable, ("image_references", "image_id"), ("image_layers", "image_id"), ("images", "id")
    )
    return found


def insert(connection: sqlite3.Connection, candidate: Candidate, layers: tuple[Layer, ...]) -> None:
    """Insert the image with its layers, lowest first, and its names."""
    connection.execute(
        "INSERT OR IGNORE INTO images (id, manifest_digest, config, manifest, created) VALUES (?, ?, ?, ?, ?)",
        (candidate.id, candidate.manifest_digest, candidate.config.content, candidate.manifest, time.time_ns()),
    )
    connection.executemany(
        "INSERT OR IGNORE INTO image_layers (image_id, position, layer) VALUES (?, ?, ?)",
        [(candidate.id, position, layer.number) for position, layer in enumerate(layers)],
    )
    layer_rows.mark_used(connection, [layer.number for layer in layers])
    insert_names(connection, candidate.id, candidate.names)


def insert_names(connection: sqlite3.Connection, image_id: str, names: Iterable[str]) -> None:
    """Give the names to the image. Another image that had one of them loses it."""
    rows = [(name, image_id) for name in names]
    connection.executemany("INSERT OR REPLACE INTO image_references (name, image_id) VALUES (?, ?)", rows)


def delete_strays(connection: sqlite3.Connection) -> int:
    """Delete the names and layers of images that do not exist: their layers could not be deleted. Returns how many."""
    tables = ("image_references", "image_layers")
    unknown = "image_id NOT IN (SELECT id FROM images)"
    return sum(connection.execute(f"DELETE FROM {table} WHERE {unknown}").rowcount for table in tables)


def delete(connection: sqlite3.Connection, image_ids: Sequence[str]) -> None:
    """Delete images and their names."""
    rows = [(image_id,) for image_id in image_ids]
    connection.executemany("DELETE FROM image_references WHERE image_id = ?", rows)
    connection.executemany("DELETE FROM image_layers WHERE image_id = ?", rows)
    connection.executemany("DELETE FROM images WHERE id = ?", rows)
