"""The sessions of processes that are executed in containers: finding them and killing all that belongs to them."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# How long the agent kills a session that keeps making processes, or one with a process that hangs in the kernel.
KILL_SECONDS = 5.0


def end_abandoned(folder: Path, pids: Callable[[], Sequence[int]]) -> int:
    """Kill the further processes that an earlier agent started in the container with bundle ``folder``.

    ``pids`` lists those in the container's cgroup. Returns how many such calls there were.
    """
    abandoned = list(folder.glob("exec-*.pid"))
    for pid_file in abandoned:
        if (leader := recorded_pid(pid_file)) is not None:
            kill_session(leader, parent_and_session(leader)[1] if leader in pids() else leader, pids)
        pid_file.unlink()
    for console in folder.glob("exec-*.tty"):
        console.unlink()
    return len(abandoned)


def recorded_pid(pid_file: Path) -> int | None:
    """The pid that the OCI runtime recorded; None before it has."""
    try:
        return int(pid_file.read_text())
    except (OSError, ValueError):
        return None


def kill_session(leader: int, session: int, pids: Callable[[], Sequence[int]]) -> None:
    """SIGKILL to ``leader``, its ``session`` and its descendants among ``pids``, until none is left.

    A process that it was just making has no parent any more, but is still in its session.
    """
    doomed = {leader, session} - {0}
    ended: set[int] = set()
    deadline = time.monotonic() + KILL_SECONDS
    while time.monotonic() < deadline:
        relations = {pid: parent_and_session(pid) for pid in pids()}
        while found := {
            pid for pid, relation in relations.items() if pid not in doomed and not doomed.isdisjoint(relation)
        }:
            doomed |= found
        left = (doomed & relations.keys()) - ended
        if not left:
            return
        ended |= _kill_all(left, deadline)  # and look again for what they were just making


def _kill_all(pids: set[int], deadline: float) -> set[int]:
    """SIGKILL to each of ``pids``; those that have ended by ``deadline``, all of them unless the kernel holds one."""
    pidfds: dict[int, int] = {}
    poller = select.poll()
    try:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                pidfd = os.pidfd_open(pid)
                pidfds[pidfd] = pid
                poller.register(pidfd, select.POLLIN)
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        waiting = set(pidfds)
        while waiting and (ready := poller.poll(max(0.0, deadline - time.monotonic()) * 1000)):
            for pidfd, _ in ready:
                poller.unregister(pidfd)
                waiting.discard(pidfd)
        return pids - {pidfds[pidfd] for pidfd in waiting}
    finally:
        for pidfd in pidfds:
            os.close(pidfd)


def kill(pid: int) -> None:
    """SIGKILL to a process, if it still exists."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def parent_and_session(pid: int) -> tuple[int, int]:
    """The pids of its parent and of its session's leader; zeros for a process that does not exist."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
    except OSError:
        return (0, 0)
    return (int(fields[1]), int(fields[3]))
