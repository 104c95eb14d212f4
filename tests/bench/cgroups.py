"""Makes the parent cgroup for all pods of a run in every hierarchy, as kubelet does."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from host.files import mounts


@contextlib.contextmanager
def own_cgroups(name: str) -> Iterator[None]:
    """Make cgroup ``name`` in every hierarchy. After the block it is removed with all cgroups below it."""
    folders = [Path(root + name) for root in _hierarchies()]
    try:
        for folder in folders:
            folder.mkdir(exist_ok=True)
            _inherit_cpuset(folder)
        yield
    finally:
        for folder in folders:
            for path, _, _ in os.walk(folder, topdown=False):
                Path(path).rmdir()


def _hierarchies() -> list[str]:
    return [entry.target for entry in mounts.mount_table() if entry.filesystem in ("cgroup", "cgroup2")]


def _inherit_cpuset(folder: Path) -> None:
    # A new v1 cpuset is empty and accepts no process until it has processors and memory nodes.
    for name in ("cpuset.cpus", "cpuset.mems"):
        file = folder / name
        if file.exists() and not file.read_text().strip():
            file.write_text((folder.parent / name).read_text())
