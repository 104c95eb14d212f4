"""Makes an image of a checkpoint archive. Any node can pull the image and restore a container from it.

The image has one layer, the archive itself, and annotations about the checkpoint, in the form of CRI-O and podman.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from host import untrusted_json
from host.errors import InvalidArgumentError, LimitError
from host.untrusted_json import JsonError
from images.archives.files import BoundedTarInfo, open_archive
from images.oci.manifests import OCI_CONFIG, OCI_INDEX, OCI_MANIFEST
from images.oci.platforms import this_machine
from runtime.checkpoint import documents
from runtime.checkpoint.documents import ConfigDump

NAME = "org.criu.checkpoint.container.name"
OLD_NAME = "io.kubernetes.cri-o.annotations.checkpoint.name"
IMAGE_NAME = "org.criu.checkpoint.rootfsImageName"
IMAGE_ID = "org.criu.checkpoint.rootfsImageID"
RUNTIME = "org.criu.checkpoint.runtime.name"
ENGINE = "org.criu.checkpoint.engine.name"

_LAYER = "application/vnd.oci.image.layer.v1.tar"
_MAX_MEMBERS = 20_000
_MAX_CONFIG_BYTES = 1 << 20
_MAX_NAME_LENGTH = 255
_PIECE = 8 << 20
_NEEDED = (documents.CONFIG, documents.SPEC, f"{documents.IMAGES}/inventory.img", f"{documents.IMAGES}/pstree.img")
_CORE = re.compile(rf"{documents.IMAGES}/core-\d+\.img")
_MACHINES = {1: "amd64", 2: "arm", 3: "arm64", 4: "ppc64le", 5: "s390x"}  # CRIU's numbers


@dataclass(frozen=True, slots=True)
class Archive:
    """A checkpoint archive that was checked: the checkpointed container, and the positions of the archive's files.

    ``members`` are its regular files by name, each with its offset and length.
    """

    config: ConfigDump
    members: Mapping[str, tuple[int, int]]


def open_checkpoint(path: Path) -> int:
    """Open the archive. Raises NotFoundError, and InvalidArgumentError if it is not a file."""
    descriptor = open_archive(path)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size % tarfile.BLOCKSIZE:
        os.close(descriptor)
        raise InvalidArgumentError(
            f"checkpoint archive {path} is not a plain tar file: decompress it first if it is compressed"
        )
    return descriptor


def look_through(descriptor: int, path: Path, check: Callable[[], None]) -> Archive:
    """Check all members of an archive without extracting them. Blocks.

    Raises InvalidArgumentError for a broken archive, one with members that no checkpoint has or without those that all
    have, or one from another kind of machine. Raises LimitError for too many members.
    """
    subject = f"checkpoint archive {path}"
    found: dict[str, tuple[int, int]] = {}
    count = 0
    try:
        with (
            os.fdopen(os.dup(descriptor), "rb") as file,
            tarfile.open(fileobj=file, mode="r:", tarinfo=BoundedTarInfo) as archive,
        ):
            for member in archive:
                member.pax_headers = {}  # may be large, and tarfile keeps all members
                check()
                count += 1
                if count > _MAX_MEMBERS:
                    raise LimitError(f"{subject} has more than {_MAX_MEMBERS} members")
                name = _checked(member, subject)
                if name in found:
                    raise InvalidArgumentError(f"{subject} has the member {name!r} twice")
                if member.isreg():
                    found[name] = (member.offset_data, member.size)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise InvalidArgumentError(f"{subject} is broken or not a tar file: {error}") from error
    size = os.fstat(descriptor).st_size
    for name, (offset, length) in found.items():
        if offset + length > size:
            raise InvalidArgumentError(f"{subject} is broken: {name} is cut off")
    for name in _NEEDED:
        if name not in found:
            raise InvalidArgumentError(f"{subject} is not a checkpoint of a container: it has no {name}")
    _check_machine(descriptor, found, subject)
    offset, length = found[documents.CONFIG]
    if length > _MAX_CONFIG_BYTES:
        raise InvalidArgumentError(f"{subject}: {documents.CONFIG} is larger than {_MAX_CONFIG_BYTES} bytes")
    try:
        return Archive(untrusted_json.decode(os.pread(descriptor, length, offset), ConfigDump), found)
    except JsonError as error:
        raise InvalidArgumentError(f"{subject}: {documents.CONFIG}: {error}") from error


def _checked(member: tarfile.TarInfo, subject: str) -> str:
    """The name of a member. The member must be a regular file or a folder with a plain name."""
    name = member.name.removeprefix("./").rstrip("/") or "."
    parts = name.split("/")
    shown = ascii(name[:_MAX_NAME_LENGTH])
    if name.startswith("/") or ".." in parts or "" in parts or any(part.startswith(".wh.") for part in parts):
        raise InvalidArgumentError(f"{subject} has the member {shown}, a name that leaves the archive or hides others")
    if any(len(os.fsencode(part)) > _MAX_NAME_LENGTH for part in parts):
        raise InvalidArgumentError(f"{subject} has a name of more than {_MAX_NAME_LENGTH} bytes: {shown}")
    if not (member.isdir() or (member.isreg() and not member.issparse())):
        raise InvalidArgumentError(f"{subject} has the member {shown}, which is neither a file nor a folder")
    return name


def _check_machine(descriptor: int, found: dict[str, tuple[int, int]], subject: str) -> None:
    """Raise InvalidArgumentError if its processes ran on another kind of machine."""
    core = next((place for name, place in sorted(found.items()) if _CORE.fullmatch(name)), None)
    if core is None:
        raise InvalidArgumentError(f"{subject} is not a checkpoint of a container: it has no process")
    start = os.pread(descriptor, 14, core[0])  # two magic numbers, a length, and the first member: the machine
    machine = _MACHINES.get(start[13]) if len(start) == 14 and start[12] == 0x08 else None
    own = this_machine().architecture
    if machine is not None and machine != own:
        raise InvalidArgumentError(f"{subject} was made on {machine}: its processes cannot run on {own}")
    if machine is None:
        raise InvalidArgumentError(f"{subject} is broken: CRIU's images have an unknown machine")


def write_layout(archive: Archive, descriptor: int, folder: Path, check: Callable[[], None]) -> None:
    """Write the image of an archive to the new ``folder``, as an OCI image layout. Blocks. Raises OSError."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True, mode=0o700)
    layer, size = _copy(descriptor, blobs, check)
    platform = this_machine()
    config = {
        "architecture": platform.architecture,
        "os": platform.os,
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [layer]},
    }
    dump = archive.config
    annotations = {
        NAME: dump.name,
        OLD_NAME: dump.name,
        IMAGE_NAME: dump.rootfs_image_name,
        IMAGE_ID: dump.rootfs_image or dump.rootfs_image_ref,
        RUNTIME: dump.runtime,
        ENGINE: "podkeel",
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": _blob(blobs, OCI_CONFIG, config),
        "layers": [{"mediaType": _LAYER, "digest": layer, "size": size}],
        "annotations": annotations,
    }
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [_blob(blobs, OCI_MANIFEST, manifest)]}
    (folder / "index.json").write_bytes(msgspec.json.encode(index))
    (folder / "oci-layout").write_bytes(b'{"imageLayoutVersion": "1.0.0"}')


def _copy(source: int, blobs: Path, check: Callable[[], None]) -> tuple[str, int]:
    """Copy the archive to a blob of the layout. Returns the blob's digest and size."""
    partial, digest, position = blobs / f"partial-{secrets.token_hex(4)}", hashlib.sha256(), 0
    with partial.open("xb") as target:
        while piece := os.pread(source, _PIECE, position):
            check()
            digest.update(piece)
            target.write(piece)
            position += len(piece)
    partial.rename(blobs / digest.hexdigest())
    return f"sha256:{digest.hexdigest()}", position


def _blob(blobs: Path, kind: str, document: object) -> dict[str, object]:
    content = msgspec.json.encode(document)
    digest = hashlib.sha256(content).hexdigest()
    (blobs / digest).write_bytes(content)
    return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(content)}
