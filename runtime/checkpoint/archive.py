"""Makes a checkpoint archive from the saved parts of a container. Blocks."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from runtime.checkpoint import documents
from runtime.checkpoint.layer_diff import write_diff
from runtime.checkpoint.tar_writer import TarWriter

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_MAX_LOG_BYTES = 1 << 30  # a larger log of the container is left out
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """The paths of a container's files that a checkpoint contains.

    ``volumes`` are the folders of its image's VOLUMEs, by their names in the archive. ``shared_memory`` is the pod's
    /dev/shm.
    """

    upper: Path
    lower: Sequence[Path]
    volumes: dict[str, Path] = field(default_factory=dict)
    shared_memory: Path | None = None


def save_files(saved: Saved, folder: Path, check: Callable[[], None]) -> None:
    """Write the container's files to ``folder``: its own changes, its VOLUMEs and shared memory.

    The container must be frozen. Raises OSError, LimitError and UnsupportedError.
    """
    with _new_file(folder / documents.DIFF) as target:
        removed = write_diff(saved.upper, saved.lower, target, check)
    with _new_file(folder / documents.DELETED) as target:
        _write_all(target, documents.deleted_files(removed))
    if saved.shared_memory is not None:
        save_tree(saved.shared_memory, folder / documents.SHARED_MEMORY, check)
    for name, volume in saved.volumes.items():
        (folder / documents.VOLUMES).mkdir(mode=0o700, exist_ok=True)
        save_tree(volume, folder / documents.VOLUMES / f"{name}.tar", check)


def write_archive(
    folder: Path, written: dict[str, bytes], log: Path | None, partial: Path, check: Callable[[], None]
) -> int:
    """Write the content of ``folder``, the documents ``written`` and the container's log to the new file ``partial``.

    Returns its size in bytes. Raises OSError.
    """
    with _new_file(partial) as target:
        archive = TarWriter(target, check)
        for name, content in written.items():
            archive.content(name, content)
        _add_images(archive, folder / documents.IMAGES)
        for name in (documents.DIFF, documents.DELETED, documents.SHARED_MEMORY):
            _add_file(archive, name, folder / name)
        for name in (documents.CRIU_LOG, documents.STATISTICS):
            _add_file(archive, name, folder / "work" / name)
        volumes = folder / documents.VOLUMES
        if volumes.is_dir():
            archive.folder(documents.VOLUMES)
            for entry in sorted(volumes.iterdir()):
                _add_file(archive, f"{documents.VOLUMES}/{entry.name}", entry)
        if log is not None:
            _add_file(archive, documents.LOG, log)
        archive.end()
        os.fsync(target)
        return os.fstat(target).st_size


def publish(partial: Path, location: Path) -> None:
    """Rename the complete file to its final path. Raises OSError."""
    partial.replace(location)


def _add_images(archive: TarWriter, folder: Path) -> None:
    archive.folder(documents.IMAGES)
    for entry in sorted(folder.iterdir()):
        _add_file(archive, f"{documents.IMAGES}/{entry.name}", entry)


def _add_file(archive: TarWriter, name: str, path: Path) -> None:
    """Add the file, if it is a regular file.

    A user with access to the log's folder could have replaced it by a link.
    """
    try:
        descriptor = os.open(path, _READ)
    except OSError:
        return
    try:
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and (name != documents.LOG or status.st_size <= _MAX_LOG_BYTES):
            archive.file(name, descriptor)
    finally:
        os.close(descriptor)


def without_shared_memory(saved: Saved) -> Saved:
    """The same files without the pod's shared memory."""
    return replace(saved, shared_memory=None)


def save_tree(source: Path, target: Path, check: Callable[[], None]) -> None:
    """Write the folder ``source`` to the new tar file ``target``. Raises OSError."""
    root = os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with _new_file(target) as descriptor:
            writer = TarWriter(descriptor, check)
            writer.tree(root)
            writer.end()
    finally:
        os.close(root)


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[int]:
    descriptor = os.open(path, _NEW, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, content: bytes) -> None:
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(content)
