"""Conmon on its way to a container: what is left when it fails, and what it answers."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from host import processes
from host.files.inotify import wait_for_entries
from runtime.cgroups.monitor_cgroup import MonitorCgroup
from runtime.cgroups.tree import CgroupTree
from runtime.layout import ContainerFolder
from runtime.oci.conmon_start import RuntimeRefusedError, StartingMonitor
from runtime.oci.null_device import open_private_null
from tests.support.descriptors import descriptors_left

if os.geteuid() != 0:
    pytest.skip("needs root: a null device is made", allow_module_level=True)

_SLEEP = ("sleep", "1000")


@pytest.fixture(autouse=True)
def others() -> Iterator[set[str]]:
    """The children that this process has before the test, such as agents of other tests; nothing else is left after."""
    os.close(open_private_null())  # the folder that the first one opens stays open
    descriptors, children = _descriptors(), _children()
    yield children
    assert _children() == children
    assert _descriptors() == descriptors


def _descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def _children() -> set[str]:
    found: set[str] = set()
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            found.update((thread / "children").read_text().split())
    return found


def _monitor(tmp_path: Path, *command: str) -> StartingMonitor:
    cgroup = MonitorCgroup(CgroupTree(2, "cgroupfs"), "", "")  # without open() nothing enters it
    return StartingMonitor(lambda: command, ContainerFolder(tmp_path / "container"), None, cgroup)


async def _abandon(monitor: StartingMonitor, others: set[str]) -> None:
    await monitor.abandon()
    await _until_reaped(others)


async def _until_reaped(others: set[str]) -> None:
    """Let the loop notice the end of the killed processes: of all children except the ``others``."""
    loop, reaped = asyncio.get_running_loop(), asyncio.Event()

    def look() -> None:
        if _children() - others:
            loop.call_later(0.01, look)
        else:
            reaped.set()

    look()
    await reaped.wait()


@pytest.mark.parametrize("free", range(10))
def test_nothing_is_left_when_descriptors_run_out(tmp_path: Path, free: int, others: set[str]) -> None:
    async def body() -> None:
        with descriptors_left(free):
            monitor = _monitor(tmp_path, *_SLEEP)
            with contextlib.suppress(OSError):
                await asyncio.wait_for(monitor.create(), 0.2)
            await monitor.abandon()
        await _until_reaped(others)

    asyncio.run(body())


@pytest.mark.parametrize("what", ["os.pidfd_open", "host.processes.start_time"])
def test_a_conmon_that_cannot_be_named_is_ended(
    tmp_path: Path, what: str, others: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_pid: int) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def body() -> None:
        monitor = _monitor(tmp_path, *_SLEEP)
        with pytest.raises(OSError, match="Too many"):
            await monitor.create()
        await _abandon(monitor, others)

    monkeypatch.setattr(what, refuse)
    asyncio.run(asyncio.wait_for(body(), 60))


def test_a_conmon_whose_container_is_unknown_is_ended(
    tmp_path: Path, others: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    named = processes.start_time

    def refuse_init(pid: int) -> int | None:
        if pid == 1:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return named(pid)

    async def body() -> None:
        monitor = _monitor(tmp_path, "sh", "-c", """echo '{"pid": 1}' >&3; exec sleep 1000""")
        with pytest.raises(OSError, match="Too many"):
            await monitor.create()
        await _abandon(monitor, others)

    monkeypatch.setattr(processes, "start_time", refuse_init)
    asyncio.run(asyncio.wait_for(body(), 60))


def test_an_error_cut_inside_a_character_is_reported(tmp_path: Path, others: set[str]) -> None:
    async def body() -> None:
        monitor = _monitor(tmp_path, "sh", "-c", r"""printf '{"pid": -1, "message": "no caf\303"}\n' >&3""")
        with pytest.raises(RuntimeRefusedError, match="no caf"):
            await monitor.create()
        await _abandon(monitor, others)

    asyncio.run(asyncio.wait_for(body(), 60))


@pytest.mark.parametrize("free", range(3))
def test_looking_for_a_process_leaves_no_descriptor(free: int) -> None:
    with descriptors_left(free), contextlib.suppress(OSError):
        pidfd = processes.open_process(os.getpid(), None)
        assert pidfd is not None
        os.close(pidfd)


def test_an_abandoned_conmon_has_ended_with_what_it_started(tmp_path: Path, others: set[str]) -> None:
    started = tmp_path / "started"
    # What has much memory takes a while to end.
    slow = f'{sys.executable} -c \'x = bytearray(1 << 28); open("{started}", "w").close(); input()\' <&4 & wait'

    async def body() -> None:
        monitor = _monitor(tmp_path, "sh", "-c", slow)
        creating = asyncio.ensure_future(monitor.create())
        assert await wait_for_entries(tmp_path, started.exists, 20)
        creating.cancel()
        children = {pid for child in _children() - others for pid in (int(child), *_children_of(child))}
        await monitor.abandon()
        assert len(children) == 2
        assert [pid for pid in children if processes.start_time(pid) is not None] == []
        await _until_reaped(others)

    asyncio.run(body())


def _children_of(pid: str) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
