"""Small tar files of a checkpoint, as most of them are: unpacked without the process that unpacks layers. Blocks."""

from __future__ import annotations

import errno
import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

from host.files.file_tree import open_below
from images.archives.files import BoundedTarInfo

_MAX_TAR_BYTES = 256 << 10  # bytes of the tar file
_MAX_MEMBERS = 200
_MAX_PARTS = 32
_MAX_ID = (1 << 32) - 2
_MAX_SECONDS = 1 << 40
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Something else is in the folder already.
_IN_THE_WAY = (errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV)


def unpack_small(archive: Path, folder: Path) -> bool:
    """Unpack a small tar file that holds only folders, regular files and symbolic links.

    False for any other file, also for a broken one: ``folder`` may hold a part of it then, and the file is for the
    process that unpacks layers. Raises OSError.
    """
    content = _read(archive)
    if content is None:
        return False
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:", tarinfo=BoundedTarInfo) as file:
            members = _plain_members(file)
            if members is None:
                return False
            root = os.open(folder, _FOLDER)
            try:
                for member, name in members:
                    _make(file, member, name, root)
                for member, name in reversed(members):
                    if member.isdir():
                        _finish_folder(member, name, root)
            finally:
                os.close(root)
    except (tarfile.TarError, ValueError, OverflowError, EOFError):
        return False
    except OSError as error:
        if error.errno in _IN_THE_WAY:
            return False
        raise
    return True


def _read(archive: Path) -> bytes | None:
    descriptor = os.open(archive, _READ)
    with os.fdopen(descriptor, "rb") as file:
        content = file.read(_MAX_TAR_BYTES + 1)
    return content if len(content) <= _MAX_TAR_BYTES else None


def _plain_members(file: tarfile.TarFile) -> Sequence[tuple[tarfile.TarInfo, str]] | None:
    """The members with their clean names; None if one of them is not plain. The folder itself is called ``.``.

    Each is in a folder that is a member before it, so that no name leads through a link.
    """
    found: list[tuple[tarfile.TarInfo, str]] = []
    folders, names = {"."}, set[str]()
    for member in file:
        name = member.name.removeprefix("./").rstrip("/") or "."
        parent, last = (".", name) if "/" not in name else (name.rpartition("/")[0], name.rpartition("/")[2])
        odd = name in names or parent not in folders or name.count("/") >= _MAX_PARTS
        odd = odd or (name == "." and not member.isdir()) or last in ("", "..") or (last == "." and name != ".")
        odd = odd or last.startswith(".wh.") or "\0" in name or "\0" in member.linkname
        if odd or len(found) >= _MAX_MEMBERS or not _is_plain(member):
            return None
        names.add(name)
        if member.isdir():
            folders.add(name)
        found.append((member, name))
    return found


def _is_plain(member: tarfile.TarInfo) -> bool:
    kind = member.isdir() or member.issym() or (member.isreg() and not member.issparse())
    ids = 0 <= member.uid <= _MAX_ID and 0 <= member.gid <= _MAX_ID
    return kind and ids and 0 <= member.mtime < _MAX_SECONDS and not member.pax_headers


def _make(file: tarfile.TarFile, member: tarfile.TarInfo, name: str, root: int) -> None:
    if name == ".":
        return
    parent, _, last = name.rpartition("/")
    above = open_below(root, parent or ".", _FOLDER)
    try:
        if member.isdir():
            os.mkdir(last, 0o700, dir_fd=above)
        elif member.issym():
            os.symlink(member.linkname, last, dir_fd=above)
            os.chown(last, member.uid, member.gid, dir_fd=above, follow_symlinks=False)
            os.utime(last, (member.mtime, member.mtime), dir_fd=above, follow_symlinks=False)
        else:
            source = file.extractfile(member)
            assert source is not None
            with os.fdopen(os.open(last, _NEW, 0o600, dir_fd=above), "wb") as target:
                target.write(source.read())
                target.flush()
                _finish(member, target.fileno())
    finally:
        os.close(above)


def _finish_folder(member: tarfile.TarInfo, name: str, root: int) -> None:
    descriptor = open_below(root, name, _FOLDER)
    try:
        _finish(member, descriptor)
    finally:
        os.close(descriptor)


def _finish(member: tarfile.TarInfo, descriptor: int) -> None:
    os.fchown(descriptor, member.uid, member.gid)
    os.fchmod(descriptor, member.mode & 0o7777)
    os.utime(descriptor, (member.mtime, member.mtime))
