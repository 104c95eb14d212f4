"""Removing file trees with any content.

What cannot be removed is reported and does not delay the rest. As ``python -I -S -c WORKER FOLDER_OF_THE_SOURCES`` this
is a separate process. It empties the folder of descriptor 3 and prints what stays. The pipe of descriptor 4 carries the
orders to pause and to continue. The process ends when the pipe is closed, which happens at the latest when the agent
ends.
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

TYPE_CHECKING = False  # a worker that has to start quickly imports this, and typing is slow
if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MOST_TOLD = 20
WORKER_FOLDER, WORKER_CONTROL = 3, 4
PAUSE, GO_ON = b"p", b"c"
WORKER = f"import sys; sys.path.append(sys.argv[1]); from {__name__} import main; main()"

_BATCH = 32  # things that are removed between two looks at the pipe
# A file may be written into a folder while that is removed, and renamed then: the rows of a pod or container are.
_ATTEMPTS = 3
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_GET_FLAGS, _SET_FLAGS = 0x80086601, 0x40086602  # FS_IOC_GETFLAGS and FS_IOC_SETFLAGS of ioctl_iflags(2)
_FLAGS = struct.Struct("=l4x")
_KEPT_FROM_REMOVAL = 0x10 | 0x20  # FS_IMMUTABLE_FL, FS_APPEND_FL


class OutOfBudgetError(Exception):
    """The tree has more files than the budget allows to remove."""


class Removal:
    """Removes trees and keeps a report.

    ``told`` has the first sentences about what stays, ``failures`` counts all of it. Raises OutOfBudgetError as soon as
    more than ``budget`` files and folders would be removed; None means no limit. ``pace`` is called before each batch.
    Files and folders that carry the immutable or the append-only flag lose it. Nothing behind a mount is touched.
    """

    def __init__(self, budget: int | None = None, pace: Callable[[], None] | None = None) -> None:
        self.told: list[str] = []
        self.failures = 0
        self._budget = budget
        self._removed = 0
        self._pace = pace
        self._steps = 0

    def remove(self, folder: int, name: str) -> bool:
        """Remove the tree ``name`` in the open ``folder``; returns whether nothing stays. A missing one is no error."""
        try:
            try:
                top = open_below(folder, name, _FOLDER)
            except NotADirectoryError:
                self._unlink(folder, name)
                return True
            except OSError as error:
                if error.errno != errno.ELOOP:  # a link that O_NOFOLLOW met
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
            self._tell(shown(name), error)
            return False
        return True

    def _empty(self, top: int, name: str) -> None:
        told, failures = len(self.told), self.failures
        while True:
            del self.told[told:]
            self.failures = failures
            walk = Walk(top, on_error=lambda place, error: self._tell(f"{name}/{place}", error))
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
                    self._tell(f"{name}/{walk.place(step.name)}", error)
            if not walk.left_out or self._removed == before:
                return

    def _unlink(self, folder: int, name: str) -> None:
        self._spend()
        try:
            os.unlink(name, dir_fd=folder)
        except PermissionError:
            _clear_flags(folder, name)
            os.unlink(name, dir_fd=folder)
        self._removed += 1

    def _remove_folder(self, folder: int, name: str) -> None:
        self._spend()
        try:
            os.rmdir(name, dir_fd=folder)
        except PermissionError:
            _clear_flags(folder, name)
            os.rmdir(name, dir_fd=folder)
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

    def _tell(self, place: str, error: OSError) -> None:
        if error.errno == errno.ENOTEMPTY and self.failures:
            return  # what it still holds was reported
        self.failures += 1
        if len(self.told) < MOST_TOLD:
            mounted = error.errno in (errno.EXDEV, errno.EBUSY)
            self.told.append(f"{place}: {'something is mounted on it' if mounted else error.strerror}")


def _clear_flags(folder: int, name: str) -> None:
    """Take the immutable and the append-only flag from ``name`` and from the ``folder`` it is in; see chattr(1)."""
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
        pass  # a file system without flags, or no right to change them: removing says what is wrong


def remove_tree(path: Path) -> list[str]:
    """Remove the tree ``path``; returns what stays and why. Blocks. A missing path is no error."""
    try:
        folder = os.open(path.parent, _FOLDER)
    except FileNotFoundError:
        return []
    told: list[str] = []
    try:
        for _ in range(_ATTEMPTS):
            removal = Removal()
            removal.remove(folder, path.name)
            told = removal.told
            if not any(sentence.endswith(os.strerror(errno.ENOTEMPTY)) for sentence in told):
                break
    finally:
        os.close(folder)
    return [f"{path.parent}/{sentence}" for sentence in told]


def _obey() -> None:
    """Pause if the last order on the pipe was to, until there is another."""
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
    sys.stdout.write(json.dumps({"failures": removal.failures, "told": removal.told}))
