"""Undoes checkpoints that the end of the agent interrupted: containers are thawed, and files are removed.

Each checkpoint that is being made has a folder. Its file ``archive`` names the file that is written elsewhere.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from host.errors import PodkeelError
from host.files.removal import remove_tree
from host.processes import wait_all_ended
from runtime.checkpoint.criu_run import GIVE_UP_SECONDS, fail_writes, working_in

_ARCHIVE = "archive"
_KILL_SECONDS = 5.0
_LOOK_SECONDS = 0.02

_log = logging.getLogger("podkeel.checkpoint")


def begin(folder: Path, partial: Path) -> None:
    """Create the folder of a checkpoint that writes to ``partial``. Blocks. Raises OSError."""
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(mode=0o700)
    descriptor = os.open(folder / _ARCHIVE, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, os.fsencode(partial))
    finally:
        os.close(descriptor)


def remove(folder: Path) -> None:
    """Remove the folder of a checkpoint, and the file that it was writing. Missing ones are no error. Blocks."""
    with contextlib.suppress(FileNotFoundError):
        partial = Path(os.fsdecode((folder / _ARCHIVE).read_bytes()))
        if partial.is_absolute() and partial.name.startswith("."):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                partial.unlink()
    if left := remove_tree(folder):
        raise PodkeelError(left[0])


def settle(folder: Path, thaw: Callable[[str], None]) -> int:
    """End and undo each checkpoint that has a folder in ``folder``. Returns their number. Blocks for seconds.

    ``thaw`` is called with the id of the container of each.
    """
    count = 0
    for entry in sorted(folder.iterdir()):
        count += 1
        _log.warning("checkpoint of container %s: interrupted: undoing it", entry.name)
        end_work(entry)
        thaw(entry.name)
        try:
            remove(entry)
        except (PodkeelError, OSError) as error:
            _log.error("checkpoint of container %s: cannot be removed: %s", entry.name, error)
    return count


def end_work(folder: Path) -> None:
    """End the processes that work in ``folder``: make them fail, and kill those that remain. Blocks."""
    deadline = time.monotonic() + GIVE_UP_SECONDS
    while pids := working_in(folder):
        if time.monotonic() > deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            wait_all_ended(pids, _KILL_SECONDS)
            return
        fail_writes(pids)
        time.sleep(_LOOK_SECONDS)
