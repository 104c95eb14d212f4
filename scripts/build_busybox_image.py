#!/usr/bin/env python3
"""Build a small container image from this machine's static busybox. Needs only Python.

    build_busybox_image.py [--format oci|docker] [--reference NAME] [--busybox /bin/busybox] FILE

The archive contains busybox with a link for each of its applets, ``/etc/passwd``, ``/etc/group``, ``/tmp`` and the
usual folders. Tests import this module to build images from any layers.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

DEFAULT_REFERENCE = "busybox:latest"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"

_PASSWD = """root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
www-data:x:33:33:www-data:/var/www:/bin/false
user:x:1000:1000:user:/home/user:/bin/sh
nobody:x:65534:65534:nobody:/home:/bin/false
"""
_GROUP = """root:x:0:
daemon:x:1:
www-data:x:33:
users:x:100:user
audio:x:29:user
user:x:1000:
nobody:x:65534:
"""
_FOLDERS = {"bin": 0o755, "dev": 0o755, "etc": 0o755, "home": 0o755, "proc": 0o555, "root": 0o700, "sys": 0o555}
_MORE_FOLDERS = {"tmp": 0o1777, "usr": 0o755, "usr/bin": 0o755, "var": 0o755, "var/www": 0o755}


def digest_of(content: bytes) -> str:
    """The sha256 digest of ``content``."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def make_tar(entries: Sequence[tuple[tarfile.TarInfo, bytes]], *, form: int = tarfile.PAX_FORMAT) -> bytes:
    """An uncompressed tar of ``entries`` in their order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for info, content in entries:
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def entry(
    name: str,
    content: bytes | str = b"",
    *,
    kind: bytes = tarfile.REGTYPE,
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    mtime: float = 0,
    link: str = "",
    device: tuple[int, int] = (0, 0),
    pax: Mapping[str, str] | None = None,
) -> tuple[tarfile.TarInfo, bytes]:
    """One entry for ``make_tar``."""
    data = content.encode() if isinstance(content, str) else content
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.uid, info.gid, info.mtime, info.linkname = kind, mode, uid, gid, mtime, link
    info.devmajor, info.devminor = device
    info.size = len(data) if kind == tarfile.REGTYPE else 0
    info.pax_headers = dict(pax or {})
    return info, data


def folder(name: str, mode: int = 0o755, *, uid: int = 0, gid: int = 0) -> tuple[tarfile.TarInfo, bytes]:
    """A folder for ``make_tar``."""
    return entry(name, kind=tarfile.DIRTYPE, mode=mode, uid=uid, gid=gid)


def busybox_layer(busybox: Path = Path("/bin/busybox")) -> bytes:
    """A layer with busybox, its applets as symbolic links, and the files that a root file system needs."""
    applets = subprocess.run([str(busybox), "--list"], check=True, capture_output=True, text=True).stdout.split()
    entries = [folder(name, mode) for name, mode in {**_FOLDERS, **_MORE_FOLDERS}.items()]
    entries.append(folder("home/user", 0o755, uid=1000, gid=1000))
    entries.append(entry("bin/busybox", busybox.read_bytes(), mode=0o755))
    for applet in sorted(set(applets) - {"busybox"}):
        entries.append(entry(f"bin/{applet}", kind=tarfile.SYMTYPE, link="busybox", mode=0o777))
    entries.append(entry("usr/bin/env", kind=tarfile.SYMTYPE, link="../../bin/env", mode=0o777))
    entries.append(entry("etc/passwd", _PASSWD))
    entries.append(entry("etc/group", _GROUP))
    entries.append(entry("etc/nsswitch.conf", "hosts: files dns\n"))
    return make_tar(entries)


def _gzip(data: bytes) -> bytes:
    return gzip.compress(data, 6, mtime=0)


@dataclass(frozen=True)
class BuiltImage:
    """An image in memory: uncompressed ``layers``, lowest first, and ``config``, the ``config`` of the OCI config."""

    layers: Sequence[bytes]
    config: Mapping[str, object] = field(default_factory=dict)
    architecture: str = ""
    compress: Callable[[bytes], bytes] | None = _gzip
    suffix: str = "+gzip"

    def blobs(self) -> tuple[dict[str, bytes], bytes]:
        """All blobs by digest, including the manifest; and the manifest again."""
        diff_ids = [digest_of(layer) for layer in self.layers]
        machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
        config = json.dumps(
            {
                "architecture": self.architecture or machine,
                "os": "linux",
                "config": dict(self.config),
                "rootfs": {"type": "layers", "diff_ids": diff_ids},
                "history": [{"created_by": "podkeel"} for _ in diff_ids],
            }
        ).encode()
        compressed = [self.compress(layer) if self.compress else layer for layer in self.layers]
        manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": OCI_MANIFEST,
                "config": descriptor(OCI_CONFIG, config),
                "layers": [descriptor(OCI_LAYER + (self.suffix if self.compress else ""), blob) for blob in compressed],
            }
        ).encode()
        return {digest_of(blob): blob for blob in (*compressed, config, manifest)}, manifest

    @property
    def id(self) -> str:
        """The digest of the image's config."""
        config = json.loads(self.blobs()[1])["config"]
        return str(config["digest"])

    def write_oci(self, path: Path, reference: str = "") -> None:
        """Write an OCI archive (an image layout in a tar file)."""
        blobs, manifest = self.blobs()
        named = descriptor(OCI_MANIFEST, manifest)
        if reference:
            named["annotations"] = {"org.opencontainers.image.ref.name": reference}
        index = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [named]}).encode()
        entries = [entry("oci-layout", '{"imageLayoutVersion": "1.0.0"}'), entry("index.json", index)]
        entries += [entry(f"blobs/sha256/{digest.partition(':')[2]}", blob) for digest, blob in blobs.items()]
        path.write_bytes(make_tar(entries))

    def write_docker(self, path: Path, *references: str) -> None:
        """Write a docker archive, as ``docker save`` does."""
        config = self.blobs()[0][self.id]
        names = [f"{index}/layer.tar" for index in range(len(self.layers))]
        config_name = f"{self.id.partition(':')[2]}.json"
        manifest = json.dumps([{"Config": config_name, "RepoTags": list(references), "Layers": names}])
        entries = [entry(name, layer) for name, layer in zip(names, self.layers, strict=True)]
        path.write_bytes(make_tar([*entries, entry(config_name, config), entry("manifest.json", manifest)]))


def descriptor(media_type: str, content: bytes) -> dict[str, object]:
    """A manifest's descriptor of a blob."""
    return {"mediaType": media_type, "digest": digest_of(content), "size": len(content)}


def busybox_image(config: Mapping[str, object] | None = None, more_layers: Sequence[bytes] = ()) -> BuiltImage:
    """The busybox image. Members of ``config`` replace its own (``User``, ``Volumes``, ``Entrypoint`` …)."""
    own: dict[str, object] = {
        "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        "Cmd": ["sh"],
    }
    return BuiltImage((busybox_layer(), *more_layers), {**own, **(config or {})})


def build_busybox_archive(
    path: Path,
    reference: str = DEFAULT_REFERENCE,
    *,
    form: str = "oci",
    config: Mapping[str, object] | None = None,
    more_layers: Sequence[bytes] = (),
) -> BuiltImage:
    """Write the busybox image to ``path`` as an ``oci`` or ``docker`` archive. Returns the image."""
    image = busybox_image(config, more_layers)
    if form == "docker":
        image.write_docker(path, reference)
    else:
        image.write_oci(path, reference)
    return image


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Build a container image out of this machine's static busybox.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--format", choices=("oci", "docker"), default="oci")
    parser.add_argument("--reference", default=DEFAULT_REFERENCE)
    parser.add_argument("--busybox", type=Path, default=Path("/bin/busybox"))
    arguments = parser.parse_args()
    if not arguments.busybox.exists():
        print(f"{arguments.busybox} is missing: install the package busybox-static", file=sys.stderr)
        return 1
    image = BuiltImage((busybox_layer(arguments.busybox),), busybox_image().config)
    if arguments.format == "docker":
        image.write_docker(arguments.file, arguments.reference)
    else:
        image.write_oci(arguments.file, arguments.reference)
    print(f"{arguments.file}: {arguments.reference} {image.id}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
