"""The images that other nodes can get from this one, read from the store's database and its content folder."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from host.errors import InvalidArgumentError, UnavailableError
from images.oci.digests import digest_of, is_digest
from images.oci.manifests import OCI_MANIFEST, parse_manifest

_BUSY_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class ServedManifest:
    """A manifest as the registry sent it, with its media type and digest."""

    content: bytes
    media_type: str
    digest: str


class Catalog:
    """Finds manifests and blobs in the data folder of an agent. Changes nothing, and works while the agent runs.

    Each method blocks and may be called in any thread. They raise UnavailableError if the database cannot be read.
    """

    def __init__(self, data_dir: Path) -> None:
        self._database = f"file:{quote(str(data_dir / 'podkeel.db'))}?mode=ro"
        self._content = data_dir / "content"

    def manifest(self, repository: str, reference: str) -> ServedManifest | None:
        """The manifest with that tag or digest; None if there is none, or if a blob that it names was not kept.

        A digest is found in any repository.
        """
        if is_digest(reference):
            rows = self._rows("SELECT id, manifest FROM images WHERE manifest_digest = ?", reference)
        else:
            rows = self._rows(
                "SELECT id, manifest FROM images JOIN image_references ON image_id = id WHERE name = ?",
                f"{repository}:{reference}",
            )
        for image_id, content in rows:
            digest = digest_of(content, reference if is_digest(reference) else "")
            media_type = self._media_type(image_id, content)
            if media_type and reference in (digest, reference if not is_digest(reference) else ""):
                return ServedManifest(content, media_type, digest)
        return None

    def blob(self, digest: str) -> int | bytes | None:
        """A new file descriptor of a compressed layer, or the content of an image's configuration; None if missing."""
        if not is_digest(digest):
            return None
        with contextlib.suppress(FileNotFoundError):
            return os.open(self._path(digest), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        rows = self._rows("SELECT id, config FROM images WHERE id = ?", digest)
        return rows[0][1] if rows else None

    def _media_type(self, image_id: str, content: bytes) -> str:
        """The manifest's media type; empty if it is not the manifest of this image with all its blobs."""
        try:
            manifest = parse_manifest(content, f"image {image_id}")
        except InvalidArgumentError:  # older versions accepted manifests that are refused today
            return ""
        if manifest.config is None or manifest.config.digest != image_id:
            return ""
        if not all(self._path(layer.digest).is_file() for layer in manifest.layers):
            return ""
        return manifest.media_type or OCI_MANIFEST

    def _path(self, digest: str) -> Path:
        algorithm, _, name = digest.partition(":")
        return self._content / algorithm / name

    def _rows(self, statement: str, value: str) -> list[tuple[str, bytes]]:
        try:
            with contextlib.closing(sqlite3.connect(self._database, uri=True, timeout=_BUSY_SECONDS)) as connection:
                return connection.execute(statement, (value,)).fetchall()
        except sqlite3.Error as error:
            raise UnavailableError(f"the store of the agent cannot be read: {error}") from error
