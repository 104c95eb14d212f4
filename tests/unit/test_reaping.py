"""How children ended is known at once, and nothing of them stays."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from host.children.reaping import reap
from host.errors import DeadlineError
from host.processes import end_child, run, spawn, start_time, wait_ended


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - no event shows it
            await asyncio.sleep(0.005)


async def _gone(pid: int) -> None:
    """Until there is no entry of the process any more, not even a dead one."""
    await _until(lambda: not Path(f"/proc/{pid}").exists())


@pytest.mark.parametrize(("script", "status"), [("exit 7", 7), ("kill -TERM $$", -signal.SIGTERM)])
async def test_a_child_is_collected_behind_its_status(script: str, status: int) -> None:
    pid = spawn(["sh", "-c", script])
    pidfd = os.pidfd_open(pid)
    try:
        await wait_ended(pidfd)
        assert reap(pidfd) == status
        await _gone(pid)
        assert reap(pidfd) is None
    finally:
        os.close(pidfd)


async def test_a_living_child_is_left_alone() -> None:
    pid = spawn(["sleep", "60"])
    pidfd = os.pidfd_open(pid)
    try:
        assert reap(pidfd) is None
        assert start_time(pid) is not None
    finally:
        assert await end_child(pid, pidfd) == -signal.SIGKILL
    await _gone(pid)


async def test_a_cancelled_caller_waits_for_the_end_of_what_it_kills(tmp_path: Path) -> None:
    began = tmp_path / "began"
    pids: list[int] = []
    running = asyncio.create_task(run(["sh", "-c", f"touch {began}; exec sleep 60"], on_start=pids.append))
    await _until(lambda: bool(pids) and began.exists())
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert start_time(pids[0]) is None
    await _gone(pids[0])


async def test_past_its_time_a_command_is_killed(tmp_path: Path) -> None:
    pids: list[int] = []
    with pytest.raises(DeadlineError, match=r"did not finish within 0\.05 s"):
        await run(["sleep", "60"], timeout=0.05, on_start=pids.append)
    await _gone(pids[0])
