"""Undoes checkpoints of pods that the end of the agent interrupted: containers are thawed, and files are removed.

While a checkpoint is made, it has a folder in the agent's folder of checkpoints. Its file ``pod`` says which containers
are frozen and where the checkpoint is written.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from host.errors import PodkeelError
from host.files.removal import remove_tree
from runtime.checkpoint.interrupted import end_work
from runtime.checkpoint.pod.place import Place

PREFIX = "pod-"
_RECORD = "pod"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_log = logging.getLogger("podkeel.checkpoint")


class _Record(msgspec.Struct):
    output: str
    device: int
    inode: int
    containers: list[str]


def begin(folder: Path, output: str, place: Place, containers: Sequence[str]) -> None:
    """Create the folder of a checkpoint that is written to ``output``. Blocks. Raises OSError."""
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(mode=0o700)
    device, inode = place.identity
    record = msgspec.json.encode(_Record(output, device, inode, list(containers)))
    descriptor = os.open(folder / _RECORD, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(record)


def undo(folder: Path, place: Place) -> None:
    """Remove the written files of a checkpoint. Blocks. Raises PodkeelError."""
    place.clear()
    remove(folder)


def remove(folder: Path) -> None:
    """Remove the folder of a checkpoint. Blocks. Raises PodkeelError."""
    if left := remove_tree(folder):
        raise PodkeelError(left[0])


def settle(folder: Path, thaw: Callable[[str], None]) -> int:
    """End and undo each checkpoint of a pod that has a folder in ``folder``. Returns their number. Blocks for seconds.

    ``thaw`` is called with the id of each of their containers.
    """
    count = 0
    for entry in sorted(folder.glob(f"{PREFIX}*")):
        count += 1
        _log.warning("checkpoint of pod %s: interrupted: undoing it", entry.name.removeprefix(PREFIX))
        end_work(entry)
        record = _read(entry)
        try:
            if record is not None:
                for container_id in record.containers:
                    thaw(container_id)
                _clear(record)
            remove(entry)
        except (PodkeelError, OSError) as error:
            _log.error("checkpoint of pod %s: cannot be removed: %s", entry.name.removeprefix(PREFIX), error)
    return count


def _read(entry: Path) -> _Record | None:
    try:
        return msgspec.json.decode((entry / _RECORD).read_bytes(), type=_Record)
    except (OSError, msgspec.MsgspecError):
        return None  # it was interrupted before anything was frozen


def _clear(record: _Record) -> None:
    """Clear the caller's folder, unless it has a complete checkpoint or is another folder by now."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        descriptor = os.open(record.output, _FOLDER)
        try:
            place = Place(descriptor)
            if place.identity == (record.device, record.inode) and not place.is_complete:
                place.clear()
        finally:
            os.close(descriptor)
