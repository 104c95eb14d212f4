"""The files of one container in a checkpoint of a pod. Blocks."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from host.errors import WrongStateError
from runtime.checkpoint import documents

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_MAGIC = 8  # bytes of a CRIU image without entries
_OBJECTS = {
    "ipcns-shm-*.img": "System V shared memory",
    "ipcns-msg-*.img": "System V message queues",
    "ipcns-sem-*.img": "System V semaphores",
}


def refuse_objects(images: Path, title: str) -> None:
    """Raise WrongStateError for objects of the pod's IPC namespace that CRIU cannot restore in another namespace."""
    for pattern, words in _OBJECTS.items():
        for image in images.glob(pattern):
            if image.stat().st_size > _MAGIC:
                raise WrongStateError(f"{title}: its pod has {words}, which cannot be restored: remove them")


def write_container(folder: Path, written: dict[str, bytes], work: Path) -> None:
    """Write documents, and CRIU's log and statistics, to the folder of a container. Raises OSError."""
    for name, content in written.items():
        descriptor = os.open(folder / name, _NEW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
    for name in (documents.CRIU_LOG, documents.STATISTICS):
        with contextlib.suppress(FileNotFoundError), (work / name).open("rb") as source:
            descriptor = os.open(folder / name, _NEW, 0o600)
            with os.fdopen(descriptor, "wb") as target:
                shutil.copyfileobj(source, target)
