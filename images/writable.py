"""What containers wrote into their root file systems, counted in the background so that no call walks a tree."""

from __future__ import annotations

import contextlib
import os
import queue
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

OLDEST_SECONDS = 10.0

_BLOCK = 512  # the unit of st_blocks, whatever the file system's own (stat(2))
_BATCH = 256  # entries between two looks at the time
_DUTY = 0.2  # the part of one core that counting takes at most
_REST = 50  # a tree that takes a second to count is counted again after this many


@dataclass(frozen=True, slots=True)
class WritableUsage:
    """What one container wrote takes on disk, its folder included, and when (nanoseconds since the epoch) that was."""

    time_ns: int
    used_bytes: int
    inodes: int


@dataclass(frozen=True, slots=True)
class _Counted:
    usage: WritableUsage
    due: float


class WritableLayers:
    """Counts the folders that ``upper`` gives for container ids; for any thread.

    An answer is what was counted last. One that is older than ten seconds, or fifty times as long as the count takes,
    has the folder counted again, by one thread that takes a fifth of a core at most. That thread has no lower
    priority than others: while it waited for a processor it might hold what the whole process needs to go on.
    """

    def __init__(self, upper: Callable[[str], Path]) -> None:
        self._upper = upper
        self._counted: dict[str, _Counted] = {}
        self._waiting: set[str] = set()
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def usage(self, container_id: str) -> WritableUsage | None:
        """What was counted last, at first the folder itself; None if there is none."""
        known = self._counted.get(container_id)
        if known is None:
            try:
                status = self._upper(container_id).lstat()
            except OSError:
                return None
            known = _Counted(WritableUsage(time.time_ns(), status.st_blocks * _BLOCK, 1), 0.0)
            self._counted[container_id] = known
        if known.due <= time.monotonic():
            self._ask_for(container_id)
        return known.usage

    def forget(self, container_id: str) -> None:
        """The container is gone."""
        with self._lock:
            self._counted.pop(container_id, None)

    def close(self) -> None:
        """Stop counting."""
        self._closing.set()
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join()

    def _ask_for(self, container_id: str) -> None:
        with self._lock:
            if container_id in self._waiting or self._closing.is_set():
                return
            self._waiting.add(container_id)
            self._queue.put(container_id)
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="writable-layers", daemon=True)
                self._thread.start()

    def _serve(self) -> None:
        while (container_id := self._queue.get()) is not None and not self._closing.is_set():
            begin = time.monotonic()
            counted = self._count(self._upper(container_id))
            now = time.monotonic()
            with self._lock:
                self._waiting.discard(container_id)
                if counted is not None and container_id in self._counted:
                    due = now + max(OLDEST_SECONDS, (now - begin) * _REST)
                    self._counted[container_id] = _Counted(counted, due)

    def _count(self, folder: Path) -> WritableUsage | None:
        """None when it is cut short by the end, or when the folder is gone."""
        blocks = inodes = 0
        linked: set[int] = set()
        begin = time.monotonic()
        for number, status in enumerate(_statuses(str(folder)), start=1):
            if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
                if status.st_ino in linked:
                    continue
                linked.add(status.st_ino)
            blocks += status.st_blocks
            inodes += 1
            if number % _BATCH == 0:
                if self._closing.wait((time.monotonic() - begin) * (1 / _DUTY - 1)):
                    return None
                begin = time.monotonic()
        return WritableUsage(time.time_ns(), blocks * _BLOCK, inodes) if inodes else None


def _statuses(folder: str) -> Iterator[os.stat_result]:
    """Of ``folder`` and everything below it; what goes away meanwhile is left out."""
    with contextlib.suppress(OSError):
        yield os.lstat(folder)
    folders = [folder]
    while folders:
        try:
            entries = os.scandir(folders.pop())
        except OSError:
            continue
        with entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    yield entry.stat(follow_symlinks=False)
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
