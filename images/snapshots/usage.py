"""The size of containers' writable layers: read from project quotas, or counted in a background thread.

No call waits for the count of a tree.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import queue
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from host.errors import PodkeelError
from host.files.file_tree import Walk
from images.snapshots.project_quota import ProjectQuotas

OLDEST_SECONDS = 10.0
TRUSTED_SECONDS = 600.0  # a process outside of the container may also change its files

_BLOCK = 512  # the unit of st_blocks on every file system (stat(2))
BATCH = 256  # entries between two checks of the time
COUNT_SHARE = 0.2  # share of one core that a running count uses
_SMALL_SECONDS = 0.0002  # of processor time; enough for almost 100 files
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
TOTAL_SHARE = 0.01  # share of one core for counting all trees that are not small

_log = logging.getLogger("podkeel.images")

# Returns a value that changes when a container may have written; None if unknown. It must not raise.
Activity = Callable[[str], int | None]


@dataclass(frozen=True, slots=True)
class WritableUsage:
    """The size of what one container wrote, with its upper folder, and the time of the count in ns since the epoch.

    This is the data in its root file system, and in the folders of its image's VOLUMEs.
    """

    time_ns: int
    used_bytes: int
    inodes: int


@dataclass(frozen=True, slots=True)
class _Counted:
    """A count. ``activity`` is the container's activity before the count. Times are on the monotonic clock."""

    usage: WritableUsage
    due: float
    trusted_until: float = 0.0
    activity: int | None = None


@dataclass(frozen=True, slots=True)
class _Project:
    """The project of a container's folder. The own numbers are its usage outside of the container's files."""

    id: int
    own_bytes: int = 0
    own_inodes: int = 0


class WritableLayers:
    """Measures the folders that ``upper`` returns for container ids, and the ``volumes`` beside them; for any thread.

    With a project of ``quotas`` the size is the file system's current value, otherwise that of the last count. If that
    is older than ten seconds, a thread checks whether the container has been active since, and counts again if so: a
    container that did not run did not write. Small trees are counted every ten seconds at most, all others together use
    at most one hundredth of a core. The thread has normal priority: with a lower one it might wait for a processor
    while it holds a lock that the whole process needs.
    """

    def __init__(self, upper: Callable[[str], Path], quotas: ProjectQuotas | None = None) -> None:
        self.activity: Activity = lambda _: None
        self._upper = upper
        self._quotas = quotas
        self.counted_because = "" if quotas is not None else "images.project_quotas is off"
        self._projects: dict[str, _Project] = {}
        self._counted: dict[str, _Counted] = {}
        self._costs: dict[str, float] = {}  # processor seconds of the last count of each tree that is not small
        self._waiting: set[str] = set()
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self) -> str:
        """Check whether project quotas can be used. Returns why not; empty if they can."""
        if self._quotas is not None:
            self.counted_because = self._quotas.open()
        if self.counted_because:
            self._quotas = None
        return self.counted_because

    def assign_project(self, container_id: str) -> None:
        """Assign a project to this container, whose folder is new and empty. Raises LimitError, OSError."""
        if self._quotas is not None:
            self._projects[container_id] = _Project(self._quotas.assign(self._upper(container_id).parent))

    def find_project(self, container_id: str) -> None:
        """Use the project that an earlier agent assigned, if any."""
        if self._quotas is not None:
            with contextlib.suppress(OSError):
                project = self._quotas.assigned(self._upper(container_id).parent)
                if project:
                    self._projects[container_id] = _Project(project)
                    self.measure_own(container_id)

    def measure_own(self, container_id: str) -> None:
        """Measure the folders of the project that belong to overlayfs, which ``usage`` subtracts."""
        project = self._projects.get(container_id)
        if project is not None:
            folder = self._upper(container_id).parent
            own = [folder.lstat(), *_statuses(folder / "work")]
            blocks = sum(status.st_blocks for status in own)
            self._projects[container_id] = _Project(project.id, blocks * _BLOCK, len(own))

    def usage(self, container_id: str) -> WritableUsage | None:
        """The last known size, at first that of the folder itself. None if the folder does not exist."""
        project = self._projects.get(container_id)
        if project is not None and self._quotas is not None:
            with contextlib.suppress(OSError):
                now = self._quotas.usage(project.id)
                used, inodes = now.used_bytes - project.own_bytes, now.inodes - project.own_inodes
                return WritableUsage(time.time_ns(), max(used, 0), max(inodes, 1))
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
        """Forget a container that was removed."""
        with self._lock:
            self._counted.pop(container_id, None)
            self._costs.pop(container_id, None)
        project = self._projects.pop(container_id, None)
        if project is not None and self._quotas is not None:
            self._quotas.release(project.id)

    def close(self) -> None:
        """Stop counting."""
        self._closing.set()
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join()
        if self._quotas is not None:
            self._quotas.close()

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
            try:
                renewed = self._renewed(container_id, self._counted.get(container_id))
            except (OSError, PodkeelError) as error:  # for example no free descriptor: the next request counts again
                _log.warning("snapshots: files cannot be counted, the last count is kept: %s", error)
                renewed = None
            with self._lock:
                self._waiting.discard(container_id)
                if renewed is not None and container_id in self._counted:
                    self._counted[container_id] = renewed

    def _renewed(self, container_id: str, known: _Counted | None) -> _Counted | None:
        """The count to use from now on. None if ``close`` interrupts it, or the folder does not exist."""
        activity, now = self.activity(container_id), time.monotonic()
        if known is not None and activity is not None and activity == known.activity and now < known.trusted_until:
            usage = replace(known.usage, time_ns=time.time_ns())
            return replace(known, usage=usage, due=now + OLDEST_SECONDS)
        before = time.thread_time()
        counted = self._count(self._upper(container_id))
        if counted is None:
            return None
        pause, now = self._pause(container_id, time.thread_time() - before), time.monotonic()
        return _Counted(counted, now + pause, now + max(pause, TRUSTED_SECONDS), activity)

    def _pause(self, container_id: str, cost: float) -> float:
        """Seconds until the tree is counted again, according to the processor time of its last count."""
        with self._lock:
            if cost > _SMALL_SECONDS and container_id in self._counted:
                self._costs[container_id] = cost
                return max(OLDEST_SECONDS, sum(self._costs.values()) / TOTAL_SHARE)
            self._costs.pop(container_id, None)
            return OLDEST_SECONDS

    def _count(self, upper: Path) -> WritableUsage | None:
        blocks = inodes = 0
        linked: set[int] = set()
        begin = time.monotonic()
        statuses = itertools.chain(_statuses(upper), _statuses(upper.with_name("volumes")))
        for number, status in enumerate(statuses, start=1):
            if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
                if status.st_ino in linked:
                    continue
                linked.add(status.st_ino)
            blocks += status.st_blocks
            inodes += 1
            if number % BATCH == 0:
                if self._closing.wait((time.monotonic() - begin) * (1 / COUNT_SHARE - 1)):
                    return None
                begin = time.monotonic()
        return WritableUsage(time.time_ns(), blocks * _BLOCK, inodes) if inodes else None


def _statuses(folder: Path) -> Iterator[os.stat_result]:
    """The status of ``folder`` and of everything below it, without files that are deleted during the walk.

    Does not follow links, which the container may put in place of folders, and does not cross mounts.
    """
    try:
        root = os.open(folder, _FOLDER)
    except OSError:
        return
    try:
        yield os.fstat(root)
        for step in Walk(root):
            if step.entry is not None:
                with contextlib.suppress(OSError):
                    yield step.entry.stat(follow_symlinks=False)
    finally:
        os.close(root)
