"""Reads memory, parents and bundles of servers, monitors and containers from /proc."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
from collections.abc import Iterator
from pathlib import Path

_GONE = (FileNotFoundError, ProcessLookupError)


def resident_bytes(pid: int) -> int:
    """VmRSS of a process (proc(5))."""
    return _kibibytes(Path(f"/proc/{pid}/status").read_text(), "VmRSS") * 1024


def proportional_bytes(pid: int) -> int:
    """PSS of a process: its private pages and its share of shared pages (smaps_rollup)."""
    return _kibibytes(Path(f"/proc/{pid}/smaps_rollup").read_text(), "Pss") * 1024


def _kibibytes(text: str, field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) if match else 0


def processor_seconds(pid: int) -> float:
    """The processor time of a process so far, in user mode and in the kernel."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def all_processor_seconds(pid: int) -> float:
    """The processor time of the process and of the children that it has waited for."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, words[11:15])) / os.sysconf("SC_CLK_TCK")


def parent(pid: int) -> int:
    """The parent's pid."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def arguments(pid: int) -> list[str]:
    """The command line; empty for kernel threads and zombies."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]


def all_pids() -> Iterator[int]:
    """All processes."""
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def children(pid: int) -> list[int]:
    """The processes whose parent is ``pid``."""
    found = []
    for candidate in all_pids():
        with contextlib.suppress(*_GONE):
            if parent(candidate) == pid:
                found.append(candidate)
    return found


def container_inits(container_ids: set[str]) -> dict[str, int]:
    """The first process of each container, found by its cgroup's name (``<id>`` or ``…-<id>.scope``) for any server."""
    found: dict[str, list[int]] = {}
    for pid in all_pids():
        with contextlib.suppress(*_GONE):
            for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
                name = line.rpartition("/")[2].removesuffix(".scope").rpartition("-")[2]
                if name in container_ids:
                    found.setdefault(name, []).append(pid)
                    break
    return {name: min(pids) for name, pids in found.items()}


def bundle_of(container_id: str, init: int) -> Path:
    """The OCI bundle of a running container: conmon's ``-b``, or beside the working folder of a containerd shim.

    Raises LookupError if the container has another monitor.
    """
    monitor = parent(init)
    words = arguments(monitor)
    for position, word in enumerate(words[:-1]):
        if word in ("-b", "--bundle"):
            return Path(words[position + 1])
        if word.startswith("--bundle="):
            return Path(word.removeprefix("--bundle="))
    sibling = Path(f"/proc/{monitor}/cwd").resolve().parent / container_id
    if (sibling / "config.json").exists():
        return sibling
    raise LookupError(f"bundle of container {container_id}: its monitor {words[:1]} (pid {monitor}) does not tell it")


def reap_adopted_children() -> None:
    """Reap ended processes that became children of this process because it is a subreaper."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def terminate(pidfd: int, seconds: float) -> None:
    """Send SIGTERM to a child, and SIGKILL if it still runs after ``seconds``. Reaps it and closes the descriptor."""
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        if not select.select([pidfd], [], [], seconds)[0]:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    os.close(pidfd)
