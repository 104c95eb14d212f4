"""An image of the store, and its configuration."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from host import untrusted_json
from host.errors import InvalidArgumentError
from host.untrusted_json import JsonError
from images.oci.digests import check_digest, digest_of
from images.oci.layer_limit import MAX_LAYERS
from images.oci.manifests import decode_json
from images.oci.platforms import Platform

_MAX_NUMBER_LENGTH = 19  # digits of 2^63
_MAX_USER_LENGTH = 4096
_MAX_KEPT_BYTES = 16 << 20  # older versions accepted configs larger than MAX_CONFIG_BYTES


class _RawConfig(msgspec.Struct, rename="pascal"):
    user: str | None = None
    env: list[str | None] | None = None
    entrypoint: list[str | None] | None = None
    cmd: list[str | None] | None = None
    working_dir: str | None = None
    volumes: dict[str, msgspec.Raw] | None = None
    labels: dict[str, str | None] | None = None
    exposed_ports: dict[str, msgspec.Raw] | None = None
    stop_signal: str | None = None


class _RawRootFilesystem(msgspec.Struct):
    diff_ids: list[str | None] | None = None


class _RawImage(msgspec.Struct):
    architecture: str | None = None
    os: str | None = None
    variant: str | None = None
    config: _RawConfig | None = None
    rootfs: _RawRootFilesystem | None = None


_MEMBERS: dict[str, tuple[str, ...]] = {  # of the file, and of the objects in it
    "": _RawImage.__struct_encode_fields__,
    "config": _RawConfig.__struct_encode_fields__,
    "rootfs": _RawRootFilesystem.__struct_encode_fields__,
}


class ImageConfig(msgspec.Struct, frozen=True):
    """How a container of the image runs by default (OCI image specification, ``config``)."""

    user: str = ""
    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    working_dir: str = ""
    volumes: tuple[str, ...] = ()
    stop_signal: str = ""


@dataclass(frozen=True, slots=True)
class Image:
    """One image, as it was at the time of the lookup.

    ``id`` is the digest of its configuration. ``size`` is its unpacked size on disk in bytes. ``layers`` are the
    store's numbers of its layers, lowest first.
    """

    id: str
    manifest_digest: str
    repo_tags: tuple[str, ...]
    repo_digests: tuple[str, ...]
    size: int
    config: ImageConfig
    layers: tuple[int, ...]
    chain_ids: tuple[str, ...]
    pinned: bool

    @property
    def name(self) -> str:
        """Its name in messages: a tag, or else a digest reference, or else its id."""
        return next(iter((*self.repo_tags, *self.repo_digests)), self.id)


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """An image's config file: its bytes, their digest (the image's id) and the decoded fields.

    Members of ``platform`` are empty if the file does not contain them.
    """

    content: bytes
    digest: str
    config: ImageConfig
    diff_ids: tuple[str, ...]
    platform: Platform


def read_config(content: bytes, subject: str) -> ConfigFile:
    """Decode the config file in ``content``.

    As in containerd, members that are null count as absent, and upper and lower case of their names make no difference.
    Raises InvalidArgumentError if it is malformed or has more layers than this node can mount. Decoding a file of
    megabytes blocks for tens of milliseconds.
    """
    raw = decode_json(_with_proper_names(content), _RawImage, f"{subject}: its config", _MAX_KEPT_BYTES)
    given = (raw.rootfs.diff_ids if raw.rootfs else None) or []
    if len(given) > MAX_LAYERS:
        raise InvalidArgumentError(f"{subject} has {len(given)} layers: this node can mount at most {MAX_LAYERS}")
    diff_ids = tuple(check_digest(diff_id or "", f"{subject}: its config") for diff_id in given)
    fields = raw.config or _RawConfig()
    if len(fields.user or "") > _MAX_USER_LENGTH:
        raise InvalidArgumentError(f"{subject}: its config names a user of more than {_MAX_USER_LENGTH} characters")
    config = ImageConfig(
        user=fields.user or "",
        env=tuple(item for item in fields.env or () if item),
        entrypoint=tuple(item or "" for item in fields.entrypoint or ()),
        cmd=tuple(item or "" for item in fields.cmd or ()),
        working_dir=fields.working_dir or "",
        volumes=tuple(fields.volumes or ()),
        stop_signal=fields.stop_signal or "",
    )
    platform = Platform(raw.os or "", raw.architecture or "", raw.variant or "")
    return ConfigFile(content, digest_of(content), config, diff_ids, platform)


def _with_proper_names(content: bytes, inside: str = "") -> bytes:
    """The same JSON object, with the names of known members as they are in the specification."""
    try:
        members = untrusted_json.decode(content, dict[str, msgspec.Raw], max_bytes=_MAX_KEPT_BYTES, any_text=True)
    except JsonError:
        return content  # decoding it fails with a better message
    proper = {name.lower(): name for name in _MEMBERS[inside]}
    renamed: dict[str, msgspec.Raw] = {}
    for name, value in members.items():
        known = proper.get(name.lower(), name)
        if not inside and known in _MEMBERS:
            renamed[known] = msgspec.Raw(_with_proper_names(bytes(value), known))
        else:
            renamed[known] = value
    return msgspec.json.encode(renamed) if renamed != members else content


def numeric_user(user: str) -> int | None:
    """The first half of a USER as a number. None for a name; containerd also treats numbers from 2^63 as names."""
    if not (user.isascii() and user.isdigit()) or len(user.lstrip("0")) > _MAX_NUMBER_LENGTH:
        return None
    number = int(user)
    return number if number < 1 << 63 else None


def check_linux(file: ConfigFile, subject: str) -> None:
    """Raise InvalidArgumentError if the image is for another operating system than Linux."""
    if file.platform.os.lower() not in ("", "linux"):
        raise InvalidArgumentError(f"{subject} is an image for {file.platform.os}, not for linux")
