"""A checkpoint archive on the node, from which a container is restored directly. Blocks."""

from __future__ import annotations

import errno
import os
import stat
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from host import libc
from host.errors import InvalidArgumentError, LimitError, NotFoundError
from runtime.checkpoint import documents

_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_RESOLVE = libc.RESOLVE_BENEATH | libc.RESOLVE_NO_SYMLINKS | libc.RESOLVE_NO_MAGICLINKS
_PIECE = 64 << 20
_NOT_HERE = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
_DOCUMENTS = {documents.CONFIG, documents.DIFF, documents.DELETED, documents.SHARED_MEMORY}
_FOLDERS = (documents.IMAGES, documents.VOLUMES)


def open_allowed(path: str, folders: Sequence[str], max_bytes: int) -> int:
    """Open the archive at ``path``, which must be in one of ``folders`` and writable only by root.

    Raises NotFoundError for a missing file, LimitError for one of more than ``max_bytes``, and InvalidArgumentError
    for any other file, and for a path that is not allowed.
    """
    subject = f"checkpoint archive {path[:300]!r}"
    folder = next((name for name in folders if PurePosixPath(path).is_relative_to(name)), None)
    if folder is None or "\0" in path or ".." in PurePosixPath(path).parts:
        allowed = ", ".join(folders) or "none"
        raise InvalidArgumentError(
            f"{subject} is in no folder from which containers may be restored: {allowed} (checkpoint.archive_dirs)"
        )
    try:
        root = os.open(folder, _FOLDER)
        try:
            below = os.fsencode(str(PurePosixPath(path).relative_to(folder)))
            descriptor = libc.openat2(root, below, _FILE, _RESOLVE)
        finally:
            os.close(root)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"{subject} does not exist") from error
    except OSError as error:
        raise InvalidArgumentError(f"{subject} cannot be opened: {error.strerror}") from error
    try:
        _check_status(os.fstat(descriptor), subject, max_bytes)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_status(status: os.stat_result, subject: str, max_bytes: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise InvalidArgumentError(f"{subject} is not a regular file")
    if status.st_uid or status.st_mode & 0o022:
        raise InvalidArgumentError(f"{subject} can be written by others than root: chown it to root with mode 0600")
    if status.st_size > max_bytes:
        raise LimitError(f"{subject} is larger than {max_bytes} bytes (images.max_layer_bytes)")
    if status.st_size % tarfile.BLOCKSIZE:
        raise InvalidArgumentError(f"{subject} is not a plain tar file: decompress it first if it is compressed")


def unpack(descriptor: int, members: Mapping[str, tuple[int, int]], folder: Path, check: Callable[[], None]) -> None:
    """Write the ``members`` (the place and size of each, by name) that a restore needs to the new ``folder``.

    The file system shares the bytes if it can. ``check`` is called regularly and may raise. Raises OSError.
    """
    folder.mkdir(mode=0o700)
    for name in _FOLDERS:
        (folder / name).mkdir(mode=0o700)
    for name, (offset, size) in members.items():
        above, _, last = name.rpartition("/")
        if name in _DOCUMENTS or (above in _FOLDERS and last):
            target = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                _copy(descriptor, offset, size, target, check)
            finally:
                os.close(target)


def _copy(source: int, offset: int, size: int, target: int, check: Callable[[], None]) -> None:
    end, shares = offset + size, True
    while offset < end:
        check()
        length = min(_PIECE, end - offset)
        try:
            if shares:
                copied = os.copy_file_range(source, target, length, offset_src=offset)
            else:
                copied = os.sendfile(target, source, offset, length)
        except OSError as error:
            if not shares or error.errno not in _NOT_HERE:
                raise
            shares = False
            continue
        if not copied:
            raise InvalidArgumentError("the checkpoint archive became shorter while it was read")
        offset += copied
