"""Watches of files and folders, with the kernel's own inotify."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from host.files.inotify import CreatedFiles

MOST_QUEUED = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())


@pytest.fixture
async def files() -> AsyncIterator[CreatedFiles]:
    created = CreatedFiles()
    yield created
    created.close()


async def test_a_callback_is_called_for_its_name_alone(files: CreatedFiles, tmp_path: Path) -> None:
    made, other = asyncio.Event(), asyncio.Event()
    files.watch_folder(tmp_path, "wanted", made.set)
    (tmp_path / "sub").mkdir()
    files.watch_folder(tmp_path / "sub", "wanted", other.set)
    (tmp_path / "unwanted").touch()
    (tmp_path / "wanted").touch()
    await asyncio.wait_for(made.wait(), 10)
    assert not other.is_set()


async def test_a_file_is_noticed_although_the_kernel_dropped_its_event(files: CreatedFiles, tmp_path: Path) -> None:
    """A pod that causes many events cannot hide the out-of-memory kill of another one."""
    made = asyncio.Event()
    for name in ("busy", "quiet"):
        (tmp_path / name).mkdir()
    files.watch_folder(tmp_path / "busy", "none", lambda: None)
    files.watch_folder(tmp_path / "quiet", "wanted", made.set)
    one, two = tmp_path / "busy" / "one", tmp_path / "busy" / "two"
    one.touch()
    for _ in range(MOST_QUEUED // 2 + 1):  # equal events in a row are merged, so these differ in turn
        one.rename(two)
        two.rename(one)
    (tmp_path / "quiet" / "wanted").touch()
    await asyncio.wait_for(made.wait(), 10)
