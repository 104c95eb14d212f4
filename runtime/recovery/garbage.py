"""Objects in folders and the kernel that the store does not know: found for a check, removed at the start."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from host import processes
from host.errors import PodkeelError
from host.files import mounts
from runtime.containers.bundle import idmapped_mounts
from runtime.layout import Layout
from runtime.namespaces.pid import end_holder
from runtime.namespaces.pinned import drop_namespaces, remove_path
from runtime.oci.conmon import Monitors

_log = logging.getLogger("podkeel.recovery")


@dataclass(frozen=True, slots=True)
class Finding:
    """A difference between the store and the node: the ``kind`` of object, its name, and the problem."""

    kind: str
    object: str
    problem: str


@dataclass(frozen=True, slots=True)
class Known:
    """The ids that the store knows: all existing ones, and the live ones, which have resources in the kernel."""

    sandboxes: Collection[str]
    containers: Collection[str]
    live_sandboxes: Collection[str]
    live_containers: Collection[str]


class AllBut(Collection[str]):
    """The set of all ids except some."""

    def __init__(self, excepted: Collection[str]) -> None:
        self._excepted = frozenset(excepted)

    def __contains__(self, wanted: object) -> bool:
        return wanted not in self._excepted

    def __iter__(self) -> Iterator[str]:
        raise TypeError("the ids cannot be listed")

    def __len__(self) -> int:
        raise TypeError("the ids cannot be counted")


def unknown_ids(
    layout: Layout, monitors: Monitors, parents: Mapping[str, str], known: Known
) -> tuple[set[str], set[str]]:
    """Ids of sandboxes and of containers with folders, cgroups or processes that are not ``known``.

    ``parents`` are the cgroups of this agent's pods by sandbox id.
    """
    sandboxes = {name for name in (*_names(layout.sandboxes), *parents) if name not in known.sandboxes}
    holders = [*_names(layout.containers), *_names(layout.exits), *monitors.running()]
    for root in _runtime_roots(layout):
        holders += runtime_containers(root)
    return sandboxes, {name for name in holders if name not in known.containers}


def find_leftovers(layout: Layout, monitors: Monitors, parents: Mapping[str, str], known: Known) -> Iterator[Finding]:
    """All objects of this agent that the store does not know. Only reads files and the kernel.

    ``parents`` are the cgroups of this agent's pods by sandbox id.
    """
    yield from _unknown_names(layout.sandboxes, known.live_sandboxes, "folder", "belongs to no live sandbox")
    yield from _unknown_names(layout.containers, known.containers, "folder", "belongs to no container")
    yield from _unknown_names(layout.exits, known.containers, "file", "belongs to no container")
    for root in _runtime_roots(layout):
        yield from _unknown_names(root, known.live_containers, "container", "is known to the OCI runtime only")
    for target in mounts.mounts_below(layout.run):
        owner = _owner(layout, target)
        if owner is not None and owner not in known.live_sandboxes and owner not in known.containers:
            yield Finding("mount", target, "belongs to nothing in the store")
    for container_id, pid in monitors.running().items():
        if container_id not in known.live_containers:
            yield Finding("process", f"conmon {pid}", f"monitors {container_id[:13]}, which is not alive in the store")
    for sandbox_id, parent in parents.items():
        if sandbox_id not in known.live_sandboxes:
            yield Finding("cgroup", parent, "belongs to no live sandbox")


def _unknown_names(folder: Path, known: Collection[str], kind: str, problem: str) -> Iterator[Finding]:
    for name in _names(folder):
        if name not in known:
            yield Finding(kind, str(folder / name), problem)


def end_monitors(monitors: Monitors, doomed: Collection[str]) -> None:
    """Kill the conmons of the containers ``doomed`` and the OCI runtimes they wait for, and wait until they ended."""
    for container_id, pid in monitors.running().items():
        if container_id in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            processes.end_group(pid)


def drop_run_folders(layout: Layout, known: Known) -> int:
    """Unmount and delete run folders of sandboxes and containers that the store does not know.

    A folder that cannot be removed is logged. Returns the number of such folders.
    """
    failed = 0
    for names, wanted, drop in (
        (_names(layout.sandboxes), known.live_sandboxes, _drop_sandbox),
        (_names(layout.containers), known.containers, _drop_container),
        (_names(layout.exits), known.containers, _drop_exit),
    ):
        for name in names:
            if name not in wanted:
                try:
                    drop(layout, name)
                except (PodkeelError, OSError) as error:
                    failed += 1
                    _log.error("garbage %s: cannot be removed: %s", name, error)
    return failed


def _drop_sandbox(layout: Layout, name: str) -> None:
    end_holder(None, layout.sandbox(name), name)
    _unmount_below(layout.sandbox(name).path)
    drop_namespaces(layout.sandbox(name))


def _drop_container(layout: Layout, name: str) -> None:
    idmapped_mounts.release(layout.container(name).rootfs)
    _unmount_below(layout.container(name).path)
    remove_path(layout.container(name).path)


def _drop_exit(layout: Layout, name: str) -> None:
    remove_path(layout.exits / name)


def _unmount_below(folder: Path) -> None:
    for target in mounts.mounts_below(folder):
        mounts.unmount(target, lazy=True)


def runtime_containers(root: Path) -> list[str]:
    """The ids of containers with state in the folder ``root`` of an OCI runtime."""
    return [name for name in _names(root) if (root / name).is_dir()]


def _runtime_roots(layout: Layout) -> list[Path]:
    return [layout.run / "oci" / name for name in _names(layout.run / "oci")]


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except FileNotFoundError:
        return []


def _owner(layout: Layout, target: str) -> str | None:
    for folder in (layout.sandboxes, layout.containers):
        if target.startswith(f"{folder}/"):
            return target[len(str(folder)) + 1 :].partition("/")[0]
    return None
