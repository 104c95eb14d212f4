"""Removes file trees with any content.

What cannot be removed is reported and does not delay the rest. ``python -I -S -c WORKER FOLDER_OF_THE_SOURCES`` runs
this as a separate process. It empties the folder of descriptor 3 and prints what stays. Descriptor 4 is a pipe with the
orders to pause and to continue. The process ends when the pipe is closed, at the latest when the agent ends.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import struct
import sys

from host.files.file_tree import Walk, open_below, shown

TYPE_CHECKING = False  # the worker, which must start quickly, imports this module, and importing typing is slow
if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MAX_MESSAGES = 20
WORKER_FOLDER, WORKER_CONTROL = 3, 4
PAUSE, CONTINUE = b"p", b"c"
WORKER = f"import sys; sys.path.append(sys.argv[1]); from {__name__} import main; main()"

_BATCH = 32  # objects that are removed before the pipe is read again
# A file may be written into a folder that is being removed, and then renamed, as the rows of a pod or container are.
_ATTEMPTS = 3
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_GET_FLAGS, _SET_FLAGS = 0x80086601, 0x40086602  # FS_IOC_GETFLAGS and FS_IOC_SETFLAGS of ioctl_iflags(2)
_FLAGS = struct.Struct("=l4x")
_KEPT_FROM_REMOVAL = 0x10 | 0x20  # FS_IMMUTABLE_FL, FS_APPEND_FL


class OutOfBudgetError(Exception):
    """The tree has more files than the budget allows to remove."""


class Removal:
    """Removes trees and keeps a report.

    ``messages`` has the first sentences about what stays; ``failures`` is the number of all failures. Raises
    OutOfBudgetError before more than ``budget`` files and folders are removed; None means no limit. ``pace`` is called
    before each batch. The immutable and the append-only flag of files and folders are cleared. Mounts are not entered.
    """

    def __init__(self, budget: int | None = None, pace: Callable[[], None] | None = None) -> None:
        self.messages: list[str] = []
        self.failures = 0
        self._budget = budget
        self._removed = 0
        self._pace = pace
        self._steps = 0

    def remove(self, folder: int, name: str) -> bool:
        """Remove the tree ``name`` in the open ``folder``. Return whether nothing stays. A missing tree is no error."""
        try:
            try:
                top = open_below(folder, name, _FOLDER)
            except NotADirectoryError:
                self._unlink(folder, name)
                return True
            except OSError as error:
                if error.errno != errno.ELOOP:  # ELOOP: it is a symbolic link
                    raise
                self._unlink(folder, name)
                return True
            try:
                self._empty(top, shown(name))
            finally:
                os.close(top)
            self._remove_folder(folder, name)
        except FileNotFoundError:
            return True
        except OSError as error:
            self._report(shown(name), error)
            return False
        return True

    def _empty(self, top: int, name: str) -> None:
        messages, failures = len(self.messages), self.failures
        while True:
            del self.messages[messages:]
            self.failures = failures
            walk = Walk(top, on_error=lambda place, error: self._report(f"{name}/{place}", error))
            before = self._removed
            for step in walk:
                try:
                    if step.entry is None:
                        self._remove_folder(step.folder, step.name)
                    elif not step.entry.is_dir(follow_symlinks=False):
                        self._unlink(step.folder, step.name)
                except FileNotFoundError:
                    pass
                except OSError as error:
                    self._report(f"{name}/{walk.place(step.name)}", error)
            if not walk.left_out or self._removed == before:
                return

    def _unlink(self, folder: int, name: str) -> None:
        self._remove(os.unlink, folder, name)

    def _remove_folder(self, folder: int, name: str) -> None:
        self._remove(os.rmdir, folder, name)

    def _remove(self, remove: Callable[..., None], folder: int, name: str) -> None:
        self._spend()
        try:
            remove(name, dir_fd=folder)
        except PermissionError:
            _clear_flags(folder, name)
            remove(name, dir_fd=folder)
        self._removed += 1

    def _spend(self) -> None:
        if self._pace is not None:
            if self._steps % _BATCH == 0:
                self._pace()
            self._steps += 1
        if self._budget is not None:
            if self._budget <= 0:
                raise OutOfBudgetError
            self._budget -= 1

    def _report(self, place: str, error: OSError) -> None:
        if error.errno == errno.ENOTEMPTY and self.failures:
            return  # what the folder still has was reported already
        self.failures += 1
        if len(self.messages) < MAX_MESSAGES:
            mounted = error.errno in (errno.EXDEV, errno.EBUSY)
            self.messages.append(f"{place}: {'something is mounted on it' if mounted else error.strerror}")


def _clear_flags(folder: int, name: str) -> None:
    """Clear the immutable and the append-only flag (chattr(1)) of ``name`` and of its ``folder``."""
    _clear_flags_of(folder)
    status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
        descriptor = open_below(folder, name, os.O_RDONLY | os.O_NONBLOCK)
        try:
            _clear_flags_of(descriptor)
        finally:
            os.close(descriptor)


def _clear_flags_of(descriptor: int) -> None:
    try:
        (flags,) = _FLAGS.unpack(fcntl.ioctl(descriptor, _GET_FLAGS, bytes(_FLAGS.size)))
        if flags & _KEPT_FROM_REMOVAL:
            fcntl.ioctl(descriptor, _SET_FLAGS, _FLAGS.pack(flags & ~_KEPT_FROM_REMOVAL))
    except OSError:
        pass  # the file system has no flags, or they may not be changed: the removal reports the error


def remove_tree(path: Path) -> list[str]:
    """Remove the tree ``path``. Returns what stays and why. Blocks. A missing path is no error."""
    try:
        folder = os.open(path.parent, _FOLDER)
    except FileNotFoundError:
        return []
    messages: list[str] = []
    try:
        for _ in range(_ATTEMPTS):
            removal = Removal()
            removal.remove(folder, path.name)
            messages = removal.messages
            if not any(sentence.endswith(os.strerror(errno.ENOTEMPTY)) for sentence in messages):
                break
    finally:
        os.close(folder)
    return [f"{path.parent}/{sentence}" for sentence in messages]


def _obey() -> None:
    """If the last order on the pipe was to pause, wait for another order."""
    try:
        orders = os.read(WORKER_CONTROL, 4096)
    except BlockingIOError:
        return
    while orders.endswith(PAUSE):
        os.set_blocking(WORKER_CONTROL, True)
        orders = os.read(WORKER_CONTROL, 4096)
        os.set_blocking(WORKER_CONTROL, False)
    if not orders:
        sys.exit("the agent has ended")


def main() -> None:
    """Empty the folder that is descriptor 3, and print what stays as JSON."""
    os.nice(10)
    os.set_blocking(WORKER_CONTROL, False)
    removal = Removal(pace=_obey)
    with os.scandir(WORKER_FOLDER) as entries:
        names = [entry.name for entry in entries]
    for name in names:
        removal.remove(WORKER_FOLDER, name)
    sys.stdout.write(json.dumps({"failures": removal.failures, "messages": removal.messages}))
