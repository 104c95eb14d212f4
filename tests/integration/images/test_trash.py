"""The trash is emptied in the background, without delaying pulls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from images.content import trash
from images.content.trash import Trash
from tests.support.agent import SOON, wait_for


@pytest.fixture
async def bin_of(tmp_path: Path) -> AsyncIterator[Trash]:
    made = Trash(tmp_path / "trash")
    made.start()
    yield made
    await made.close()


def large_tree(path: Path) -> Path:
    for folder in range(20):
        (path / str(folder)).mkdir(parents=True)
        for file in range(100):
            (path / str(folder) / str(file)).touch()
    return path


async def wait_until(condition: Callable[[], bool]) -> None:
    await asyncio.to_thread(wait_for, condition, 20)


def entries(folder: Path) -> int:
    return sum(1 for _ in folder.rglob("*"))


def has_paused(folder: Path) -> bool:
    """Whether the worker waits for an order on its pipe."""
    for task in Path("/proc").glob("[0-9]*"):
        try:
            if (task / "fd/3").readlink() == folder:
                return "pipe" in (task / "wchan").read_text()
        except OSError:
            continue
    return False


async def test_large_trees_are_not_removed_while_the_disk_is_held(bin_of: Trash, tmp_path: Path) -> None:
    with bin_of.held():
        with bin_of.held():
            bin_of.throw(large_tree(tmp_path / "tree"))
            bin_of.wake()
            await wait_until(lambda: has_paused(tmp_path / "trash"))
        assert has_paused(tmp_path / "trash")
        left = entries(tmp_path / "trash")
        assert left > 1500
    await bin_of.emptied()
    assert entries(tmp_path / "trash") == 0


async def test_waiting_for_the_trash_overrides_a_hold(bin_of: Trash, tmp_path: Path) -> None:
    bin_of.throw(large_tree(tmp_path / "tree"))
    with bin_of.held():
        bin_of.wake()
        await wait_until(lambda: has_paused(tmp_path / "trash"))
        async with asyncio.timeout(SOON):
            await bin_of.emptied()
    assert entries(tmp_path / "trash") == 0


@pytest.mark.parametrize("ends_by", ["time", "room"])
async def test_a_hold_ends_after_a_time_or_if_the_disk_is_full(
    bin_of: Trash, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends_by: str
) -> None:
    monkeypatch.setattr(trash, "CHECK_SECONDS", 0.05)
    bin_of.throw(large_tree(tmp_path / "tree"))
    with bin_of.held():
        bin_of.wake()
        await wait_until(lambda: has_paused(tmp_path / "trash"))
        monkeypatch.setattr(*((trash, "MIN_FREE", 2.0) if ends_by == "room" else (bin_of, "held_until", 0.0)))
        await wait_until(lambda: not list((tmp_path / "trash").iterdir()))


async def test_the_worker_ends_with_the_agent(bin_of: Trash, tmp_path: Path) -> None:
    bin_of.throw(large_tree(tmp_path / "tree"))
    with bin_of.held():
        bin_of.wake()
        await wait_until(lambda: has_paused(tmp_path / "trash"))
        bin_of.end_control()  # as the kernel does when the agent is killed
        await wait_until(lambda: not has_paused(tmp_path / "trash"))
    await bin_of.emptied()
    assert entries(tmp_path / "trash") > 1500
    bin_of.wake()  # as the next start does
    await bin_of.emptied()
    assert entries(tmp_path / "trash") == 0
