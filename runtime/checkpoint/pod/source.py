"""Reads the checkpoint of a pod, which is not trusted, and takes from it what containers are restored from.

Other users own the folder and may change it at any time. So it is used only by descriptors, nothing in it is changed,
and each file that decides about rights is copied before it is read. Blocks.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from host import untrusted_json
from host.errors import InvalidArgumentError, LimitError
from host.files.file_tree import open_below
from host.untrusted_json import JsonError
from images.oci.platforms import this_machine
from proto.runtime.v1 import cri_pb2
from runtime.checkpoint import documents
from runtime.checkpoint.pod.document import (
    CONTAINERS,
    DOCUMENT,
    VERSION,
    PodDocument,
    SavedContainer,
    environment,
    shares_pids,
)

_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_MAX_DOCUMENT_BYTES = 4 << 20
_MAX_VALUES = 200_000
_MAX_CONTAINERS = 1000
_MAX_FILES = 20_000
_PIECE = 8 << 20
_CLONE = 0x40049409  # FICLONE of ioctl_ficlone(2)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")
_PLACE = re.compile(rf"{CONTAINERS}/\d{{1,4}}")
_CORE = re.compile(r"core-(\d{1,7})\.img")
# Large files that decide about no rights: the memory of processes, and tar files that a confined process unpacks.
_SHARED = re.compile(r"pages-\d+\.img|.*\.tar")
_TAKEN = (documents.CONFIG, documents.DIFF, documents.DELETED)


class PodSource:
    """The open folder of a checkpoint. ``subject`` names it in errors. At most ``max_bytes`` are taken from it."""

    def __init__(self, descriptor: int, subject: str, max_bytes: int) -> None:
        self._descriptor = descriptor
        self._subject = subject
        self._left = max_bytes
        self._files = 0

    def read(self) -> PodDocument:
        """Read ``pod.json``. Raises InvalidArgumentError if the folder has no checkpoint that can be restored here."""
        subject = self._subject
        try:
            file = self._open(self._descriptor, DOCUMENT, _FILE)
        except FileNotFoundError as error:
            raise InvalidArgumentError(f"{subject} has no checkpoint of a pod: {DOCUMENT} is missing") from error
        with os.fdopen(file, "rb") as opened:
            self._require_file(file, DOCUMENT)
            content = opened.read(_MAX_DOCUMENT_BYTES + 1)
        try:
            document = untrusted_json.decode(
                content, PodDocument, max_bytes=_MAX_DOCUMENT_BYTES, max_values=_MAX_VALUES
            )
        except JsonError as error:
            raise InvalidArgumentError(f"{subject}: {DOCUMENT} cannot be read: {error}") from error
        self._check(document)
        return document

    def _check(self, document: PodDocument) -> None:
        subject, own = self._subject, this_machine().architecture
        if document.version != VERSION:
            raise InvalidArgumentError(f"{subject} has version {document.version}: this agent restores {VERSION} only")
        if document.machine != own:
            raise InvalidArgumentError(
                f"{subject} was made on {document.machine[:50]!r}: its processes cannot run on {own}"
            )
        saved = document.containers
        if not 0 < len(saved) <= _MAX_CONTAINERS:
            raise InvalidArgumentError(f"{subject} has {len(saved)} containers: it must have 1 to {_MAX_CONTAINERS}")
        for what, values in (("name", [each.name for each in saved]), ("folder", [each.folder for each in saved])):
            if len(set(values)) < len(values):
                raise InvalidArgumentError(f"{subject} has two containers with the same {what}")
        for each in saved:
            if not _PLACE.fullmatch(each.folder):
                raise InvalidArgumentError(f"{subject} has the invalid folder {each.folder[:100]!a}")

    def take(self, saved: SavedContainer, target: Path, check: Callable[[], None]) -> None:
        """Create the folder ``target`` with the files for restoring a container. The checkpoint is not changed.

        Memory is shared with the checkpoint if the file system supports it, else copied. Raises InvalidArgumentError
        for anything but files with plain names, LimitError, OSError.
        """
        target.mkdir(mode=0o700)
        with closing(_Folder(self._below(self._descriptor, saved.folder))) as folder:
            for name in _TAKEN:
                self._take(folder.descriptor, name, target / name, check, needed=name == documents.CONFIG)
            for name in (documents.IMAGES, documents.VOLUMES):
                if name == documents.IMAGES or folder.has(name):
                    self._take_all(folder.descriptor, name, target / name, check)

    def take_shared_memory(self, target: Path, check: Callable[[], None]) -> bool:
        """As ``take``, for the pod's shared memory. False if the checkpoint has none."""
        return self._take(self._descriptor, documents.SHARED_MEMORY, target, check, needed=False)

    def _take_all(self, parent: int, name: str, target: Path, check: Callable[[], None]) -> None:
        target.mkdir(mode=0o700)
        with closing(_Folder(self._below(parent, name))) as folder:
            with os.scandir(folder.descriptor) as entries:
                for entry in entries:
                    if not _PLAIN_NAME.fullmatch(entry.name):
                        raise InvalidArgumentError(f"{self._subject} has the file {entry.name[:100]!a} in {name}")
                    self._take(folder.descriptor, entry.name, target / entry.name, check, needed=True)

    def _take(self, folder: int, name: str, target: Path, check: Callable[[], None], *, needed: bool) -> bool:
        check()
        try:
            source = self._open(folder, name, _FILE)
        except FileNotFoundError as error:
            if needed:
                raise InvalidArgumentError(f"{self._subject} is not complete: it has no {name}") from error
            return False
        try:
            size = self._require_file(source, name)
            self._count(size, name)
            if not (_SHARED.fullmatch(name) and _share(source, target)):
                _copy(source, target, size, check)
        finally:
            os.close(source)
        return True

    def _count(self, size: int, name: str) -> None:
        self._files += 1
        self._left -= size
        if self._files > _MAX_FILES:
            raise LimitError(f"{self._subject} has more than {_MAX_FILES} files")
        if self._left < 0:
            raise LimitError(f"{self._subject} is too large: with {name} it exceeds the limit for images")

    def _below(self, folder: int, name: str) -> int:
        try:
            return self._open(folder, name, _FOLDER)
        except FileNotFoundError as error:
            raise InvalidArgumentError(f"{self._subject} is not complete: it has no {name}") from error

    def _open(self, folder: int, name: str, flags: int) -> int:
        """Raises InvalidArgumentError for links and paths that leave it, FileNotFoundError for missing files."""
        try:
            return open_below(folder, name, flags)
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EXDEV, errno.ENXIO):
                raise InvalidArgumentError(
                    f"{self._subject}: {name} is a link, a mount, or not the file or folder that it should be"
                ) from error
            raise

    def _require_file(self, descriptor: int, name: str) -> int:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidArgumentError(f"{self._subject}: {name} is not a regular file")
        return status.st_size


class _Folder:
    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def has(self, name: str) -> bool:
        try:
            os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def close(self) -> None:
        os.close(self.descriptor)


def _share(source: int, target: Path) -> bool:
    """Make ``target`` a file with the same blocks, or a hard link; False if the file system supports neither."""
    descriptor = os.open(target, _NEW, 0o600)
    try:
        fcntl.ioctl(descriptor, _CLONE, source)
        return True
    except OSError:
        target.unlink()
    finally:
        os.close(descriptor)
    try:
        os.link(f"/proc/self/fd/{source}", target, follow_symlinks=True)
    except OSError:
        return False
    return True


def _copy(source: int, target: Path, size: int, check: Callable[[], None]) -> None:
    """Copy ``size`` bytes, even if the file is longer by now."""
    descriptor = os.open(target, _NEW, 0o600)
    try:
        position = 0
        while position < size:
            check()
            copied = os.sendfile(descriptor, source, position, min(_PIECE, size - position))
            if not copied:
                break
            position += copied
    finally:
        os.close(descriptor)


def highest_pid(folder: Path) -> int:
    """The highest pid of the processes whose images are in a folder that ``take`` made."""
    matches = (_CORE.fullmatch(path.name) for path in (folder / documents.IMAGES).iterdir())
    return max((int(match[1]) for match in matches if match), default=0)


def compare(document: PodDocument, configs: Sequence[cri_pb2.ContainerConfig], subject: str) -> None:
    """Raise InvalidArgumentError, with the differences, if the configurations are not those of the checkpoint."""
    saved = {each.name: each for each in document.containers}
    names = {config.metadata.name for config in configs}
    missing, more = sorted(saved.keys() - names), sorted(names - saved.keys())
    if missing or more:
        problems = [f"{_shown(missing)} is missing"] if missing else []
        problems += [f"{_shown(more)} is not in the checkpoint"] if more else []
        raise InvalidArgumentError(
            f"{subject}: container_configs are not those of the checkpoint: {'; '.join(problems)}"
        )
    for config in configs:
        differing = _differences(saved[config.metadata.name], config)
        if differing:
            raise InvalidArgumentError(
                f"{subject}: the configuration of container {config.metadata.name!r} differs from the checkpoint, "
                f"whose processes were started with another one: {', '.join(differing)}"
            )


def _shown(names: Sequence[str]) -> str:
    """Names from a checkpoint, which may have any characters, for an error."""
    return ", ".join(repr(name[:100]) for name in names[:5])


def _differences(saved: SavedContainer, config: cri_pb2.ContainerConfig) -> list[str]:
    """The names of the fields that differ, without their values, which may be secret."""
    pairs = (
        ("command", saved.command, list(config.command)),
        ("args", saved.args, list(config.args)),
        ("working_dir", saved.working_dir, config.working_dir),
        ("stdin", (saved.stdin, saved.stdin_once), (config.stdin, config.stdin_once)),
        ("pid namespace", saved.shares_pids, shares_pids(config)),
    )
    found = [name for name, before, now in pairs if before != now]
    given = environment(config)
    keys = {key for key in saved.envs.keys() | given.keys() if saved.envs.get(key) != given.get(key)}
    return found + [f"envs {key[:100]!r}" for key in sorted(keys)[:10]]
