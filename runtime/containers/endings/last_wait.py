"""Waits for the end of a container whose processes were killed, and handles what delays the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal

from host import processes
from host.errors import DeadlineError, WrongStateError
from runtime.cgroups.tree import CgroupTree
from runtime.state.container import Container

KILL_SECONDS = 60.0
# The time for conmon to record the end of an ended program. After it conmon is killed.
_MONITOR_SECONDS = 10.0

_log = logging.getLogger("podkeel.containers")


async def wait_for_end(cgroups: CgroupTree, container: Container) -> bool:
    """Wait until a killed container has ended. False if its program has ended but conmon cannot be killed.

    A stopped conmon is continued. A conmon that does not record the end is killed. Raises WrongStateError if a frozen
    ancestor of the container's cgroup keeps its processes, and DeadlineError if the kernel does.
    """
    holder = cgroups.frozen_holder(container.record.cgroup)
    if holder is not None:
        raise WrongStateError(
            f"{container.title} cannot end: cgroup {holder} is frozen, and killed processes in it do not end: thaw it"
        )
    if not await _program_ended(container):
        raise DeadlineError(
            f"{container.title} did not end within {KILL_SECONDS:g} s of SIGKILL: its processes hang in the kernel"
        )
    _continue_monitor(container)
    if await _ends_within(container, _MONITOR_SECONDS):
        return True
    _signal_monitor(container, signal.SIGKILL)
    if await _ends_within(container, _MONITOR_SECONDS):
        return True
    _log.error("%s: the program has ended, but conmon hangs in the kernel", container.title)
    return False


async def _program_ended(container: Container) -> bool:
    init = container.record.init
    pidfd = processes.open_process(init.pid, init.started) if init is not None else None
    if pidfd is None:
        return True
    try:
        async with asyncio.timeout(KILL_SECONDS):
            await processes.wait_ended(pidfd)
    except TimeoutError:
        return container.exited.is_set()
    finally:
        os.close(pidfd)
    return True


async def _ends_within(container: Container, seconds: float) -> bool:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(container.exited.wait(), seconds)
    return container.exited.is_set()


def _continue_monitor(container: Container) -> None:
    monitor = container.record.monitor
    if monitor is not None and not container.exited.is_set() and processes.state(monitor.pid) in (b"T", b"t"):
        _log.warning("%s: conmon was stopped by a signal: continued", container.title)
        _signal_monitor(container, signal.SIGCONT)


def _signal_monitor(container: Container, number: int) -> None:
    monitor = container.record.monitor
    pidfd = processes.open_process(monitor.pid, monitor.started) if monitor is not None else None
    if pidfd is not None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, number)
        os.close(pidfd)
