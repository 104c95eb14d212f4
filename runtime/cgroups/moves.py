"""Avoids the delay that the kernel's first move of a process between cgroups has after a quiet time."""

from __future__ import annotations

import asyncio
import contextlib
import os

from host.files.procfs import table_lines
from runtime.cgroups.tree import CgroupTree


class CgroupMoves:
    """Prepares the kernel in the background for the moves of an OCI runtime."""

    def __init__(self, cgroups: CgroupTree) -> None:
        self._cgroups = cgroups
        self._preparing: asyncio.Future[None] | None = None

    def expect(self) -> None:
        """Prepare the kernel for the move of the next container's process. The caller does not wait."""
        if self._preparing is None or self._preparing.done():
            self._preparing = asyncio.get_running_loop().run_in_executor(None, self._prepare)

    def _prepare(self) -> None:
        """Make the kernel ready to move processes between cgroups, which takes 8 to 24 ms after a quiet time.

        The first move waits for an RCU grace period; moves soon after it do not. Moving this process to its own cgroup
        begins that wait now, so that it is over when an OCI runtime moves its container.
        """
        version_2 = self._cgroups.version == 2
        controller, wanted = ("unified", b"") if version_2 else ("pids", b"pids")
        with contextlib.suppress(OSError, StopIteration, ValueError):
            lines = (line.split(b":", 2) for line in table_lines("/proc/self/cgroup"))
            own = next(path for _, names, path in lines if wanted in names.split(b","))
            root = self._cgroups.mounts[controller]
            (root / os.fsdecode(own.lstrip(b"/")) / "cgroup.procs").write_text(str(os.getpid()))
