"""Writes layers that can be pulled in parts: zstd:chunked, as buildah and skopeo of Debian 13 write it, and eStargz.

Follows "zstd:chunked file format" of containers/storage and "eStargz" of containerd's stargz-snapshotter.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import struct
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeAlias

import zstandard

from tests.support.image_builder import (
    OCI_CONFIG,
    OCI_LAYER,
    OCI_MANIFEST,
    BuiltImage,
    descriptor,
    digest_of,
    make_tar,
)
from tests.support.image_builder import entry as entry_of_tar

_PREFIX = "io.github.containers.zstd-chunked."
_TYPES = {
    tarfile.REGTYPE: "reg",
    tarfile.LNKTYPE: "hardlink",
    tarfile.SYMTYPE: "symlink",
    tarfile.DIRTYPE: "dir",
    tarfile.CHRTYPE: "char",
    tarfile.BLKTYPE: "block",
    tarfile.FIFOTYPE: "fifo",
}
CHUNK = 64 << 10

Edit: TypeAlias = Callable[[list[dict[str, object]]], None]


@dataclass
class ChunkedLayer:
    """A compressed layer with the annotations of its descriptor. ``entries`` are its table of contents."""

    blob: bytes
    annotations: dict[str, str]
    entries: list[dict[str, object]]


def described(member: tarfile.TarInfo) -> dict[str, object]:
    """A member of a tar in a table of contents, without its place."""
    entry: dict[str, object] = {"type": _TYPES[member.type], "name": member.name, "mode": member.mode}
    if member.linkname:
        entry["linkName"] = member.linkname
    if member.isreg() and member.size:
        entry["size"] = member.size
    entry["modtime"] = datetime.fromtimestamp(int(member.mtime), UTC).isoformat().replace("+00:00", "Z")
    return entry | {name: value for name, value in (("uid", member.uid), ("gid", member.gid)) if value}


def zstd_chunked(tar: bytes, *, split: bool = True, level: int = 3, edit: Edit = lambda entries: None) -> ChunkedLayer:
    """The layer in the format zstd:chunked; without ``split`` as older tools write it, without tar-split data.

    ``edit`` may change the entries of the table of contents.
    """
    compress = zstandard.ZstdCompressor(level).compress
    blob = bytearray()
    entries: list[dict[str, object]] = []
    lines: list[dict[str, object]] = []
    done = 0

    def between(until: int) -> None:
        nonlocal done
        blob.extend(compress(tar[done:until]))
        lines.append({"type": 2, "payload": base64.b64encode(tar[done:until]).decode(), "position": len(lines)})
        done = until

    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        members = archive.getmembers()
    for member in members:
        entry = described(member)
        entries.append(entry)
        if not member.isreg():
            continue
        size = member.size
        lines_of_file = {"type": 1, "name": member.name, "size": size, "payload": "AAAAAAAAAAA="}
        if size:
            between(member.offset_data)
            content = tar[member.offset_data : member.offset_data + size]
            entry |= {"digest": digest_of(content), "offset": len(blob)}
            begins = range(0, size, CHUNK)
            for begin in begins:
                part = content[begin : begin + CHUNK]
                place = {} if begin == 0 else {"type": "chunk", "name": member.name, "chunkOffset": begin}
                if len(begins) > 1:
                    place |= {"offset": len(blob), "chunkSize": len(part), "chunkDigest": digest_of(part)}
                if begin:
                    entries.append(place)
                else:
                    entry |= place
                blob += compress(part)
            entry["endOffset"] = len(blob)
            done = member.offset_data + size
        lines.append(lines_of_file | {"position": len(lines)})
    between(len(tar))
    edit(entries)
    return _with_toc(blob, entries, lines if split else None, level)


def _with_toc(
    blob: bytearray, entries: list[dict[str, object]], lines: list[dict[str, object]] | None, level: int
) -> ChunkedLayer:
    compress = zstandard.ZstdCompressor(level).compress
    split_plain = "".join(json.dumps(line) + "\n" for line in lines or ()).encode()
    split = compress(split_plain)
    toc: dict[str, object] = {"version": 1, "entries": entries}
    if lines is not None:
        toc["tarSplitDigest"] = digest_of(split)
    plain = json.dumps(toc, separators=(",", ":")).encode()
    packed = compress(plain)
    numbers = [len(blob) + 8, len(packed), len(plain), 1]
    annotations = {
        f"{_PREFIX}manifest-checksum": digest_of(packed),
        f"{_PREFIX}manifest-position": ":".join(map(str, numbers)),
    }
    blob += struct.pack("<II", 0x184D2A50, len(packed)) + packed
    if lines is not None:
        split_numbers = [len(blob) + 8, len(split), len(split_plain)]
        annotations[f"{_PREFIX}tarsplit-position"] = ":".join(map(str, split_numbers))
        blob += struct.pack("<II", 0x184D2A50, len(split)) + split
    else:
        split_numbers = [0, 0, 0]
    blob += struct.pack("<II7Q8s", 0x184D2A50, 64, *numbers, *split_numbers, b"GNUlInUx")
    return ChunkedLayer(bytes(blob), annotations, entries)


def estargz(tar: bytes, *, edit: Edit = lambda entries: None) -> ChunkedLayer:
    """The layer in the format eStargz. ``edit`` may change the entries of the table of contents."""
    blob = bytearray()
    entries: list[dict[str, object]] = []
    pending = bytearray()  # of the member of gzip at hand

    def end_member() -> None:
        blob.extend(gzip.compress(bytes(pending), 6, mtime=0))
        pending.clear()

    done = 0
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        members = archive.getmembers()
    for member in members:
        entry = described(member)
        entries.append(entry)
        pending += tar[done : member.offset_data]
        done = member.offset_data
        if not member.isreg() or not member.size:
            continue
        content = tar[done : done + member.size]
        done += member.size
        entry["digest"] = digest_of(content)
        for begin in range(0, len(content), CHUNK):
            part = content[begin : begin + CHUNK]
            end_member()
            if begin:
                entry = {"name": member.name, "type": "chunk", "chunkOffset": begin}
                entries.append(entry)
            entry |= {"offset": len(blob), "chunkDigest": digest_of(part)}
            if begin + CHUNK < len(content):
                entry["chunkSize"] = CHUNK
            pending += part
    last = max(member.offset_data + (-(-member.size // 512) * 512 if member.isreg() else 0) for member in members)
    pending += tar[done:last]
    end_member()
    edit(entries)
    text = json.dumps({"version": 1, "entries": entries}, indent="\t").encode()
    toc = len(blob)
    blob += gzip.compress(make_tar([entry_of_tar("stargz.index.json", text)]), 6, mtime=0)
    blob += b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x1a\0SG\x16\0%016xSTARGZ\x01\0\0\xff\xff" % toc + bytes(8)
    return ChunkedLayer(bytes(blob), {"containerd.io/snapshot/stargz/toc.digest": digest_of(text)}, entries)


@dataclass(frozen=True)
class ChunkedImage(BuiltImage):
    """An image whose layers can be pulled in parts. ``packed`` are its layers, compressed."""

    packed: Sequence[ChunkedLayer] = ()

    def blobs(self) -> tuple[dict[str, bytes], bytes]:
        """All blobs by digest, including the manifest; and the manifest again."""
        plain, manifest = super().blobs()
        config = plain[json.loads(manifest)["config"]["digest"]]
        layers = [
            descriptor(OCI_LAYER + self.suffix, layer.blob) | {"annotations": layer.annotations}
            for layer in self.packed
        ]
        fields = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": descriptor(OCI_CONFIG, config)}
        manifest = json.dumps(fields | {"layers": layers}).encode()
        blobs = [*(layer.blob for layer in self.packed), config, manifest]
        return {digest_of(blob): blob for blob in blobs}, manifest


def estargz_image(*tars: bytes, edit: Edit = lambda entries: None) -> ChunkedImage:
    """An image of these layers in the format eStargz, which adds a file to each."""
    packed = [estargz(tar, edit=edit) for tar in tars]
    return ChunkedImage(
        [gzip.decompress(layer.blob) for layer in packed], {"Cmd": ["sh"]}, compress=None, packed=packed
    )


def chunked_image(*tars: bytes, split: bool = True, level: int = 3) -> ChunkedImage:
    """An image of these layers in the format zstd:chunked."""
    packed = [zstd_chunked(tar, split=split, level=level) for tar in tars]
    return ChunkedImage(tars, {"Cmd": ["sh"]}, compress=None, suffix="+zstd", packed=packed)
