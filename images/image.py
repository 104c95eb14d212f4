"""An image of the store, and the configuration it carries."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from host.errors import InvalidArgumentError
from images.digests import check_digest
from images.manifests import decode_json


class _RawConfig(msgspec.Struct, rename="pascal"):
    user: str | None = None
    env: list[str] | None = None
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    working_dir: str | None = None
    volumes: dict[str, object] | None = None
    labels: dict[str, str] | None = None
    exposed_ports: dict[str, object] | None = None
    stop_signal: str | None = None


class _RawRootFilesystem(msgspec.Struct):
    diff_ids: list[str] | None = None


class _RawImage(msgspec.Struct):
    architecture: str = ""
    os: str = ""
    config: _RawConfig | None = None
    rootfs: _RawRootFilesystem | None = None


class ImageConfig(msgspec.Struct, frozen=True):
    """How a container of the image runs unless told otherwise (OCI image specification, ``config``)."""

    user: str = ""
    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    working_dir: str = ""
    volumes: tuple[str, ...] = ()
    labels: dict[str, str] = {}
    exposed_ports: tuple[str, ...] = ()
    stop_signal: str = ""


@dataclass(frozen=True, slots=True)
class Image:
    """One image, as it was when it was asked for.

    ``id`` is the digest of its configuration, ``size`` what it takes on disk unpacked, in bytes; ``layers`` are the
    store's numbers of its layers, lowest first.
    """

    id: str
    manifest_digest: str
    repo_tags: tuple[str, ...]
    repo_digests: tuple[str, ...]
    size: int
    config: ImageConfig
    config_bytes: bytes
    layers: tuple[int, ...]
    chain_ids: tuple[str, ...]
    pinned: bool

    @property
    def name(self) -> str:
        """What to call it in a message: a tag, else a digest reference, else its id."""
        return next(iter((*self.repo_tags, *self.repo_digests)), self.id)


def parse_config(content: bytes, subject: str) -> tuple[ImageConfig, tuple[str, ...]]:
    """The configuration and the diff ids of an image config file."""
    raw: _RawImage = decode_json(content, _RawImage, f"{subject}: its config")
    if raw.os and raw.os != "linux":
        raise InvalidArgumentError(f"{subject} is an image for {raw.os}, not for linux")
    diff_ids = tuple((raw.rootfs.diff_ids if raw.rootfs else None) or ())
    for diff_id in diff_ids:
        check_digest(diff_id, f"{subject}: its config")
    fields = raw.config or _RawConfig()
    config = ImageConfig(
        user=fields.user or "",
        env=tuple(fields.env or ()),
        entrypoint=tuple(fields.entrypoint or ()),
        cmd=tuple(fields.cmd or ()),
        working_dir=fields.working_dir or "",
        volumes=tuple(fields.volumes or ()),
        labels=fields.labels or {},
        exposed_ports=tuple(fields.exposed_ports or ()),
        stop_signal=fields.stop_signal or "",
    )
    return config, diff_ids
