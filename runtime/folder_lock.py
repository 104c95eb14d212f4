"""Locks on folders, so that two agents never use the same folder."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from pathlib import Path

from host.children.dying_holder import release_locks_and_sockets
from host.errors import WrongStateError

_log = logging.getLogger("podkeel.agent")


def hold_folder(folder: Path) -> int:
    """Lock ``folder`` for this process and return the descriptor with the lock.

    Raises WrongStateError if another agent holds it. An agent that was killed but hangs in the kernel does not count.
    """
    lock = folder / "lock"
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not _locked(descriptor):
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            if not (holder.isdecimal() and release_locks_and_sockets(int(holder), lock) and _locked(descriptor)):
                raise WrongStateError(
                    f"folder {folder} is in use by another agent (pid {holder or 'unknown'}): stop it, or use other "
                    "folders"
                )
            _log.warning("folder %s: its agent (pid %s) was killed and hangs: taken over", folder, holder)
    except BaseException:
        os.close(descriptor)
        raise
    with contextlib.suppress(OSError):  # the lock is valid without the pid, also on a full disk
        os.pwrite(descriptor, f"{os.getpid():<10}\n".encode(), 0)
    return descriptor


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
