"""Writing layers to the disk while they are being unpacked."""

from __future__ import annotations

import asyncio
import errno
import threading
from pathlib import Path

import pytest

from host.errors import PodkeelError
from images.content.disk_sync import DiskSync


class Disk:
    """Sees when it is written to; ``broken`` makes that fail."""

    def __init__(self) -> None:
        self.at_once = 0
        self.most_at_once = 0
        self.broken = False
        self._lock = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self._happened = asyncio.Event()

    def sync(self, folder: Path) -> None:
        self._loop.call_soon_threadsafe(self._happened.set)
        with self._lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if self.broken:
                raise OSError(errno.EIO, "input/output error")
        finally:
            with self._lock:
                self.at_once -= 1

    async def written(self, times: int) -> None:
        """Wait for that many more times."""
        for _ in range(times):
            self._happened.clear()
            await asyncio.wait_for(self._happened.wait(), 60)


@pytest.fixture
async def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk()
    monkeypatch.setattr("images.content.disk_sync.sync_file_system", made.sync)
    return made


async def test_what_is_being_unpacked_is_written_ahead(disk: Disk, tmp_path: Path) -> None:
    sync = DiskSync(tmp_path, pause=0.01)
    with sync.ahead():
        with sync.ahead():
            await disk.written(2)
        await disk.written(2)
        await sync.flush()
    assert disk.most_at_once == 1
    (task,) = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.wait({task})
    assert task.cancelled(), "nothing is written any more"
    with sync.ahead():
        await disk.written(1)


async def test_what_cannot_be_written_ahead_fails_the_flush_alone(disk: Disk, tmp_path: Path) -> None:
    sync = DiskSync(tmp_path, pause=0.01)
    disk.broken = True
    with sync.ahead():
        await disk.written(2)
        with pytest.raises(PodkeelError, match="could not be written to the disk"):
            await sync.flush()
        disk.broken = False
        await sync.flush()
