"""The tables of the images room."""

from __future__ import annotations

from host.kept_rows import Place

# The image rows that a container needs: its layers always, its image only if that is small.
_IMAGES = "SELECT image_id FROM snapshots WHERE container_id = ?1"
_SMALL_IMAGES = f"SELECT id FROM images WHERE id IN ({_IMAGES}) AND length(config) + length(manifest) < 65536"
_LAYERS = (
    "SELECT value FROM snapshots, json_each(snapshots.layers) WHERE container_id = ?1 "
    f"UNION SELECT layer FROM image_layers WHERE image_id IN ({_SMALL_IMAGES})"
)
ROWS_OF_CONTAINER = (
    Place("images", f"id IN ({_SMALL_IMAGES})"),
    Place("image_references", f"image_id IN ({_SMALL_IMAGES})"),
    Place("layers", f"number IN ({_LAYERS})", identified_by="chain_id", referring=("image_layers", "layer")),
    Place("image_layers", f"image_id IN ({_SMALL_IMAGES})"),
    Place("snapshots", "container_id = ?1", newer=("image_id", "layers")),
)

# AUTOINCREMENT: a layer number is never reused, because the folder of a dropped layer may still be in removal.
MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE images (
        id TEXT PRIMARY KEY,
        manifest_digest TEXT NOT NULL,
        config BLOB NOT NULL,
        manifest BLOB NOT NULL,
        created INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE image_references (
        name TEXT PRIMARY KEY,
        image_id TEXT NOT NULL REFERENCES images(id)
    ) STRICT;
    CREATE TABLE layers (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        chain_id TEXT NOT NULL UNIQUE,
        diff_id TEXT NOT NULL,
        blob_digest TEXT NOT NULL,
        blob_bytes INTEGER NOT NULL,
        used_bytes INTEGER NOT NULL,
        used_inodes INTEGER NOT NULL,
        opaque INTEGER NOT NULL,
        ready INTEGER NOT NULL,
        unsynced_boot TEXT NOT NULL
    ) STRICT;
    CREATE TABLE image_layers (
        image_id TEXT NOT NULL REFERENCES images(id),
        position INTEGER NOT NULL,
        layer INTEGER NOT NULL REFERENCES layers(number),
        PRIMARY KEY (image_id, position)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE snapshots (
        id TEXT PRIMARY KEY,
        container_id TEXT NOT NULL,
        image_id TEXT NOT NULL,
        layers TEXT NOT NULL
    ) STRICT
    """,
    # Layers are on the disk before their rows are written, so a row of an unwritten layer cannot exist.
    "ALTER TABLE layers DROP COLUMN unsynced_boot",
    # The digest of the files when they were unpacked, to check layers without a blob.
    "ALTER TABLE layers ADD COLUMN tree_digest TEXT NOT NULL DEFAULT ''",
)
