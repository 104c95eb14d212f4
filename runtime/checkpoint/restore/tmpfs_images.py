"""Images of file systems in memory: tar files that CRIU extracts with tar as root.

Each is written again with only the allowed members, because two readers of a tar file may see different ones. Blocks.
"""

from __future__ import annotations

import gzip
import re
import tarfile
import zlib
from pathlib import Path

from host.errors import InvalidArgumentError
from images.archives.files import BoundedTarInfo

NAME = re.compile(r"tmpfs-(dev-)?\d+\.tar\.gz\.img")
DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}

_OTHER_NODES = {(5, 1), (5, 2)}  # console and ptmx
_MAX_MEMBERS = 20_000
_MAX_UNPACKED_BYTES = 16 << 30  # bytes, unpacked
_KEPT_RECORDS = ("SCHILY.xattr.", "mtime")


def write_again(source: Path, target: Path) -> None:
    """Write the image ``source`` to the new file ``target``.

    Raises InvalidArgumentError for a broken image, one with devices other than the usual ones, or one with names that
    leave the file system.
    """
    name, links, written = source.name, set[str](), 0
    try:
        with (
            gzip.open(source, "rb") as packed,
            tarfile.open(fileobj=packed, mode="r|", tarinfo=BoundedTarInfo) as archive,
            target.open("xb") as file,
            gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=1) as again,
            tarfile.open(fileobj=again, mode="w|", format=tarfile.PAX_FORMAT) as result,
        ):
            for count, member in enumerate(archive):
                written += member.size
                if count > _MAX_MEMBERS or written > _MAX_UNPACKED_BYTES:
                    raise InvalidArgumentError(f"the checkpoint's {name} has too many members, or too large ones")
                _check(member, name, links)
                kept = {key: value for key, value in member.pax_headers.items() if key.startswith(_KEPT_RECORDS)}
                member.pax_headers = kept
                result.addfile(member, archive.extractfile(member) if member.isreg() else None)
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
        raise InvalidArgumentError(f"the checkpoint's {name} is broken: {error}") from error


def _check(member: tarfile.TarInfo, name: str, links: set[str]) -> None:
    for path in (member.name, member.linkname) if member.islnk() else (member.name,):
        parts = [part for part in path.split("/") if part not in ("", ".")]
        above = {"/".join(parts[:end]) for end in range(1, len(parts))}
        if path.startswith("/") or ".." in parts or not above.isdisjoint(links):
            raise InvalidArgumentError(f"the checkpoint's {name} has a name that leaves the file system")
    if member.issym():
        links.add("/".join(part for part in member.name.split("/") if part not in ("", ".")))
    device = (member.devmajor, member.devminor)
    if member.isblk() or (member.ischr() and device not in {*DEVICES.values(), *_OTHER_NODES}):
        raise InvalidArgumentError(f"the checkpoint's {name} has the device {device[0]}:{device[1]}")
    if not (member.isreg() or member.isdir() or member.issym() or member.islnk() or member.ischr() or member.isfifo()):
        raise InvalidArgumentError(f"the checkpoint's {name} has a member of an unknown kind")
