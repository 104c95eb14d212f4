"""Watches of files and folders, with the kernel's own inotify."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from host.files.inotify import CreatedFiles, wait_for_entries
from tests.support.descriptors import descriptors_left

MAX_QUEUED = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())


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
    await asyncio.wait_for(made.wait(), 60)
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
    for _ in range(MAX_QUEUED // 2 + 1):  # equal events in a row are merged, so these differ in turn
        one.rename(two)
        two.rename(one)
    (tmp_path / "quiet" / "wanted").touch()
    await asyncio.wait_for(made.wait(), 60)


async def test_a_file_is_waited_for_also_without_a_watch(tmp_path: Path) -> None:
    with descriptors_left(0):
        with pytest.raises(OSError, match="inotify"):
            CreatedFiles()
        asyncio.get_running_loop().call_later(0.2, (tmp_path / "wanted").mkdir)
        assert await wait_for_entries(tmp_path, (tmp_path / "wanted").exists, 10)
        assert not await wait_for_entries(tmp_path, (tmp_path / "other").exists, 0.1)


_WITHOUT_WATCHES = """
import asyncio, sys
from pathlib import Path
from network.cni.watch import follow_configuration
folder, limit = Path(sys.argv[1]), sys.argv[2]
seen = []

def refuse():
    Path("/proc/sys/user", limit).write_text("0")

async def reload():
    seen.append((folder / "new").exists())
    return None

async def main():
    if sys.argv[3] == "before":
        refuse()
    task = asyncio.ensure_future(follow_configuration(folder, reload, look_again=0.05))
    while not seen:
        await asyncio.sleep(0.01)
    if sys.argv[3] == "meanwhile":
        refuse()
    folder.mkdir()
    while not any(seen):
        await asyncio.sleep(0.05)
        (folder / "new").touch()
    assert not task.done()

asyncio.run(asyncio.wait_for(main(), 30))
"""


@pytest.mark.parametrize(
    ("limit", "when"),
    [("max_inotify_instances", "before"), ("max_inotify_watches", "before"), ("max_inotify_watches", "meanwhile")],
)
def test_a_configuration_is_noticed_also_without_a_watch(tmp_path: Path, limit: str, when: str) -> None:
    """The kernel's limits hold for a user namespace, here one of the test's own."""
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-c", _WITHOUT_WATCHES]
    result = subprocess.run(
        [*command, str(tmp_path / "net.d"), limit, when], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("noticed late") == 1
