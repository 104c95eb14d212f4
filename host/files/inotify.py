"""Waits for changes in folders (inotify(7))."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path

from host.concurrency.threads import in_fresh_thread

_POLL_SECONDS = 0.05

_IN_MODIFY = 0x2
_IN_CLOSE_WRITE = 0x8
_IN_MOVED_FROM = 0x40
_IN_MOVED_TO = 0x80
_IN_CREATE = 0x100
_IN_DELETE = 0x200
_IN_DELETE_SELF = 0x400
_IN_MOVE_SELF = 0x800
_ANY_CHANGE = (
    _IN_CLOSE_WRITE | _IN_MOVED_FROM | _IN_MOVED_TO | _IN_CREATE | _IN_DELETE | _IN_DELETE_SELF | _IN_MOVE_SELF
)

_IN_Q_OVERFLOW = 0x4000
_IN_IGNORED = 0x8000
_EVENT = struct.Struct("iIII")  # watch, mask, cookie, bytes of the name that follows

_libc = ctypes.CDLL(None, use_errno=True)


async def wait_for_entries(folder: Path, condition: Callable[[], bool], timeout: float) -> bool:
    """Wait until ``condition`` holds, for at most ``timeout`` seconds. Return whether it holds.

    It is called again when entries of ``folder`` are created or renamed. If the kernel allows no more watches, it is
    called every 50 ms.
    """
    try:
        descriptor = _open()
    except OSError:
        return await _poll(condition, timeout)
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()

    def ready() -> None:
        os.read(descriptor, 65536)
        changed.set()

    try:
        try:
            _watch(descriptor, folder, _IN_CREATE | _IN_MOVED_TO)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return await _poll(condition, timeout)
        loop.add_reader(descriptor, ready)
        async with asyncio.timeout(timeout):
            while not condition():
                changed.clear()
                await changed.wait()
    except TimeoutError:
        return condition()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
    return True


async def _poll(condition: Callable[[], bool], timeout: float) -> bool:
    try:
        async with asyncio.timeout(timeout):
            while not condition():  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(_POLL_SECONDS)
    except TimeoutError:
        return condition()
    return True


class FolderWatch:
    """Notices when entries of a folder are created, deleted or written. The folder itself need not exist.

    If it does not exist, its nearest existing ancestor is watched. Call ``start`` first. ``start`` and ``wait`` look at
    the folder in a thread, because its file system may not answer. All raise OSError if the kernel allows no more
    watches.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor = _open()
        self._watched: tuple[Path, int] | None = None
        self._changed = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._descriptor, self._ready)

    async def start(self) -> None:
        """Begin to watch."""
        await in_fresh_thread(self._follow)

    async def wait(self) -> None:
        """Wait until the folder may have changed since the last call."""
        await self._changed.wait()
        self._changed.clear()
        await in_fresh_thread(self._follow)

    def close(self) -> None:
        """Stop watching."""
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)

    def _ready(self) -> None:
        os.read(self._descriptor, 65536)
        self._changed.set()

    def _follow(self) -> None:
        """Watch the folder or its nearest existing ancestor. A folder that appears meanwhile is noticed."""
        while True:
            target = next(path for path in (self._folder, *self._folder.parents) if path.is_dir())
            try:
                number = _watch(self._descriptor, target, _ANY_CHANGE)
            except FileNotFoundError:
                continue
            if self._watched is not None and self._watched[1] != number:
                # This fails if the watched folder is gone, because its watch is gone too.
                _libc.inotify_rm_watch(self._descriptor, self._watched[1])
            self._watched = (target, number)
            if target == self._folder or not self._next_towards(target).is_dir():
                return

    def _next_towards(self, ancestor: Path) -> Path:
        return ancestor / self._folder.relative_to(ancestor).parts[0]


class CreatedFiles:
    """Calls back when a file with a certain name is created in one of many folders, or one of many files is written.

    One descriptor serves all watches. The kernel ends a watch when the watched file or folder is deleted. If the kernel
    dropped events because too many waited, every callback is called.
    """

    def __init__(self) -> None:
        self._descriptor = _open()
        self._callbacks: dict[int, tuple[bytes, Callable[[], None]]] = {}
        asyncio.get_running_loop().add_reader(self._descriptor, self._ready)

    def watch_folder(self, folder: Path, name: str, callback: Callable[[], None]) -> int:
        """Call ``callback`` when ``name`` is created in ``folder``. Returns a number for ``forget``. Raises OSError."""
        number = _watch(self._descriptor, folder, _IN_CREATE | _IN_MOVED_TO)
        self._callbacks[number] = os.fsencode(name), callback
        return number

    def watch_file(self, file: Path, callback: Callable[[], None]) -> int:
        """Call ``callback`` when ``file`` is written. Returns a number for ``forget``. Raises OSError."""
        number = _watch(self._descriptor, file, _IN_MODIFY)
        self._callbacks[number] = b"", callback
        return number

    def forget(self, number: int) -> None:
        """End a watch. A watch that the kernel has ended already is no error."""
        if self._callbacks.pop(number, None) is not None:
            _libc.inotify_rm_watch(self._descriptor, number)

    def close(self) -> None:
        """End all watches."""
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)

    def _ready(self) -> None:
        events, offset = os.read(self._descriptor, 65536), 0
        while offset < len(events):
            number, mask, _, length = _EVENT.unpack_from(events, offset)
            offset += _EVENT.size
            name = events[offset : offset + length].rstrip(b"\0")
            offset += length
            if mask & _IN_Q_OVERFLOW:
                for _, callback in list(self._callbacks.values()):
                    callback()
            elif mask & _IN_IGNORED:
                self._callbacks.pop(number, None)
            elif number in self._callbacks and self._callbacks[number][0] == name:
                self._callbacks[number][1]()


def _open() -> int:
    descriptor: int = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "inotify_init1")
    return descriptor


def _watch(descriptor: int, folder: Path, events: int) -> int:
    number: int = _libc.inotify_add_watch(descriptor, os.fsencode(folder), events)
    if number < 0:
        raise OSError(ctypes.get_errno(), "inotify_add_watch", str(folder))
    return number
