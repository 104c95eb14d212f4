"""The folder that a checkpoint of a pod is written to. The caller owns it; it is used by its descriptor only."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from host.errors import InvalidArgumentError, NotFoundError, PodkeelError, WrongStateError
from host.files.removal import Removal
from runtime.checkpoint import documents
from runtime.checkpoint.pod.document import CONTAINERS, DOCUMENT

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_PARTIAL = f".{DOCUMENT}"
_WRITTEN = (DOCUMENT, _PARTIAL, CONTAINERS, documents.SHARED_MEMORY)
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Place:
    """An open folder. ``root`` is a path to it that stays valid if the folder is renamed."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.root = Path(f"/proc/{os.getpid()}/fd/{descriptor}")

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode."""
        status = os.fstat(self.descriptor)
        return status.st_dev, status.st_ino

    def make(self, folders: Sequence[str]) -> None:
        """Create the folders of the containers. Blocks. Raises OSError."""
        os.mkdir(CONTAINERS, 0o700, dir_fd=self.descriptor)
        for folder in folders:
            os.mkdir(folder, 0o700, dir_fd=self.descriptor)

    def flush(self, check: Callable[[], None]) -> int:
        """Flush the written files to the disk. Returns their size in bytes. Blocks. Raises OSError."""
        size = 0
        for folder, _, files, inside in os.fwalk(".", dir_fd=self.descriptor):
            for name in files:
                check()
                descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=inside)
                try:
                    os.fsync(descriptor)
                    size += os.fstat(descriptor).st_size
                finally:
                    os.close(descriptor)
            if folder != ".":
                os.fsync(inside)
        return size

    def commit(self, document: bytes) -> None:
        """Write ``pod.json``, which completes the checkpoint. Blocks. Raises OSError."""
        descriptor = os.open(_PARTIAL, _NEW, 0o600, dir_fd=self.descriptor)
        with os.fdopen(descriptor, "wb") as file:
            file.write(document)
            file.flush()
            os.fsync(descriptor)
        os.rename(_PARTIAL, DOCUMENT, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
        os.fsync(self.descriptor)

    def clear(self) -> None:
        """Remove the files of a checkpoint. Blocks. Raises PodkeelError if a file cannot be removed."""
        removal = Removal()
        for name in _WRITTEN:
            removal.remove(self.descriptor, name)
        if removal.messages:
            raise PodkeelError(removal.messages[0])

    @property
    def is_complete(self) -> bool:
        """Whether the folder has a complete checkpoint."""
        try:
            return stat.S_ISREG(os.stat(DOCUMENT, dir_fd=self.descriptor, follow_symlinks=False).st_mode)
        except FileNotFoundError:
            return False


def open_place(path: str, title: str) -> int:
    """Open the empty folder ``path``. Blocks. ``title`` names the pod in errors.

    Raises InvalidArgumentError unless ``path`` is absolute and a folder that only root can write to, NotFoundError if
    it is missing, and WrongStateError if it is not empty.
    """
    descriptor = open_folder(path, f"{title}: output_path")
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid() or status.st_mode & _OTHERS_MAY_WRITE:
            raise InvalidArgumentError(
                f"{title}: output_path {path!r} can be written to by others than root, who could read or replace the "
                "checkpoint: chown it to root and set its mode to 0700"
            )
        with os.scandir(descriptor) as entries:
            there = any(entries)
        if there:
            raise WrongStateError(f"{title}: output_path {path!r} is not empty: give an empty folder")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_folder(path: str, subject: str) -> int:
    """Open a folder. Blocks. Raises InvalidArgumentError and NotFoundError, which begin with ``subject``."""
    if not path.startswith("/") or "\0" in path:
        raise InvalidArgumentError(f"{subject} {path!r} is not an absolute path of a folder on the node")
    try:
        return os.open(path, _FOLDER)
    except FileNotFoundError as error:
        raise NotFoundError(f"{subject} {path!r} does not exist") from error
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            raise InvalidArgumentError(f"{subject} {path!r} is not a folder") from error
        raise PodkeelError(f"{subject} {path!r} cannot be opened: {error.strerror}") from error
