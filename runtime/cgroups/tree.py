"""The cgroups of pods and containers, and operations on a whole cgroup. OCI runtimes set the limits."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from host.cgroups import Hierarchies, discover
from host.concurrency.threads import in_thread
from host.errors import InvalidArgumentError
from host.files.file_tree import Walk
from runtime.cgroups import freezer
from runtime.cgroups.slices import slice_name, slice_path, stop_slice, systemd_is_init, with_outer_slices
from runtime.specgen.config import SCOPE_SUBGROUP

_ID = re.compile(r"[0-9a-f]{64}")
_V1_NEEDED = ("memory", "pids", "cpu", "freezer", "devices")


@dataclass(frozen=True, slots=True)
class CgroupTree:
    """The host's cgroup hierarchies: version 2 as one mount, or version 1 as a mount per controller."""

    version: int
    driver: str
    mounts: dict[str, Path] = field(default_factory=dict)

    @classmethod
    def of_host(cls, driver: str, hierarchies: Hierarchies | None = None) -> CgroupTree:
        """The tree of the hierarchies, by default those that are mounted; ``driver`` is auto, cgroupfs or systemd."""
        hierarchies = hierarchies or discover()
        version, unified = hierarchies.version, hierarchies.unified
        if driver == "auto":
            driver = "systemd" if systemd_is_init() and version == 2 else "cgroupfs"
        elif driver not in ("cgroupfs", "systemd"):
            raise InvalidArgumentError(f"cgroup driver {driver!r}: must be auto, cgroupfs or systemd")
        if version == 2 and unified is not None:
            return cls(2, driver, {"unified": Path(unified)})
        legacy = {controller: Path(target) for controller, target in hierarchies.v1.items()}
        if unified is not None:
            legacy["hybrid"] = Path(unified)  # without controllers, but OCI runtimes create cgroups in it too
        return cls(1, driver, legacy)

    def missing_controllers(self) -> list[str]:
        """Controllers that containers need and that this host lacks."""
        if self.version == 2:
            have = (self.mounts["unified"] / "cgroup.controllers").read_text().split()
            return [name for name in ("memory", "pids", "cpu") if name not in have]
        return [name for name in _V1_NEEDED if name not in self.mounts]

    def validate_parent(self, parent: str) -> None:
        """Raise InvalidArgumentError unless ``parent`` has the form that the cgroup driver needs."""
        if self.driver == "systemd":
            name = slice_name(parent)
            if not name.endswith(".slice") or parent not in (name, slice_path(name)):
                raise InvalidArgumentError(
                    f"cgroup parent {parent!r}: the systemd driver takes a slice such as kubepods-pod1.slice, alone or "
                    "with its path; make the client use the same cgroup driver (it is in RuntimeConfig)"
                )
        elif not parent.startswith("/") or ".." in parent.split("/"):
            raise InvalidArgumentError(f"cgroup parent {parent!r}: the cgroupfs driver takes an absolute path")
        elif parent.endswith(".slice") and parent.count("/") == 1:
            raise InvalidArgumentError(
                f"cgroup parent {parent!r} is a systemd slice but the driver is cgroupfs: make both the same"
            )

    def default_parent(self, base: str, sandbox_id: str) -> str:
        """The parent of a pod that names none. It is below the configured ``base``."""
        if self.driver == "systemd":
            return f"{_slice_stem(base)}-{sandbox_id}.slice"
        return f"{base.rstrip('/')}/{sandbox_id}"

    def default_parents(self, base: str) -> dict[str, str]:
        """The default parents that exist in any hierarchy, by the id of their sandbox."""
        prefix, suffix = (f"{_slice_stem(base)}-", ".slice") if self.driver == "systemd" else ("", "")
        root = slice_path(f"{_slice_stem(base)}.slice") if self.driver == "systemd" else base
        ids = {
            entry.name.removeprefix(prefix).removesuffix(suffix)
            for folder in self.folders(root)
            if folder.is_dir()
            for entry in os.scandir(folder)
            if entry.is_dir()
        }
        return {name: self.default_parent(base, name) for name in ids if _ID.fullmatch(name)}

    def runtime_path(self, parent: str, container_id: str) -> str:
        """``linux.cgroupsPath`` of the OCI spec."""
        if self.driver == "systemd":
            return f"{slice_name(parent)}:podkeel:{container_id}"
        return f"{parent.rstrip('/')}/{container_id}"

    def path(self, parent: str, container_id: str, *, uses_subgroup: bool) -> str:
        """The container's cgroup below the mount of each hierarchy. ``uses_subgroup``: its OCI runtime is crun."""
        return self.path_of(self.runtime_path(parent, container_id), uses_subgroup=uses_subgroup)

    def path_of(self, runtime_path: str, *, uses_subgroup: bool) -> str:
        """The cgroup that an OCI runtime creates for a ``linux.cgroupsPath``."""
        if self.driver != "systemd":
            return runtime_path
        slice_of, prefix, name = runtime_path.split(":")
        scope = f"{slice_path(slice_of)}/{prefix}-{name}.scope"
        return f"{scope}/{SCOPE_SUBGROUP}" if uses_subgroup and self.version == 2 else scope

    def parent_path(self, parent: str) -> str:
        """The pod's cgroup below the mount of each hierarchy."""
        return slice_path(slice_name(parent)) if self.driver == "systemd" else parent

    async def end_parent(self, parent: str) -> None:
        """Stop a pod's own slice by systemd, so that ``remove`` can follow. No process may run in it."""
        if self.driver == "systemd":
            await stop_slice(slice_name(parent))

    async def remove_parent(self, parent: str) -> None:
        """Remove a pod's own cgroup. No process may run in it. A missing one is no error."""
        await self.end_parent(parent)
        await in_thread(self.remove, self.parent_path(parent))

    async def remove_base(self, base: str) -> None:
        """Remove the cgroup of the pods without a parent, if it is empty."""
        if self.driver != "systemd":
            await in_thread(self._remove_base, base)
            return
        for name in with_outer_slices(f"{_slice_stem(base)}.slice"):
            folders = [folder for folder in self.folders(slice_path(name)) if folder.is_dir()]
            if any(entry.is_dir() for folder in folders for entry in os.scandir(folder)):
                return
            await self.remove_parent(name)

    def folders(self, path: str) -> list[Path]:
        """The folders of cgroup ``path`` in every hierarchy."""
        return [root / path.lstrip("/") for root in dict.fromkeys(self.mounts.values())]

    def processes(self, path: str) -> list[int]:
        """The pids in cgroup ``path`` and in its descendants, which a container may have created."""
        root = self.mounts.get("unified") or self.mounts.get("pids") or self.mounts["memory"]
        found: list[int] = []
        for pids in _processes_below(root / path.lstrip("/")):
            found += pids
        return found

    def all_processes(self, path: str) -> set[int]:
        """The pids as for ``processes``, of all hierarchies."""
        return {pid for folder in self.folders(path) for pids in _processes_below(folder) for pid in pids}

    def _freezers(self, path: str) -> list[Path]:
        """The folders by which cgroup ``path`` may be frozen. One of them is the container's own scope."""
        inner = path.removesuffix(f"/{SCOPE_SUBGROUP}") if self.version == 2 else path
        roots = (self.mounts.get(name) for name in ("unified", "freezer", "hybrid"))
        return [root / inner.lstrip("/") for root in roots if root is not None]

    def is_frozen(self, path: str) -> bool:
        """Whether the processes of cgroup ``path`` are frozen, by the cgroup or by an ancestor."""
        return any(freezer.is_frozen(folder) for folder in self._freezers(path))

    def entrances(self, path: str) -> list[Path]:
        """The files that put a process in cgroup ``path``, one for each hierarchy."""
        return [folder / "cgroup.procs" for folder in self.folders(path)]

    def make(self, path: str, roots: Iterable[Path] | None = None) -> None:
        """Make cgroup ``path`` in the hierarchies mounted at ``roots``; by default in all. Blocks. Raises OSError."""
        for root in dict.fromkeys(self.mounts.values() if roots is None else roots):
            folder = root
            for name in path.strip("/").split("/"):
                folder = folder / name
                folder.mkdir(exist_ok=True)
                if self.version == 1 and root == self.mounts.get("cpuset"):
                    for file in ("cpuset.cpus", "cpuset.mems"):  # in a new cgroup empty: no process can enter it
                        if not (folder / file).read_text().strip():
                            (folder / file).write_text((folder.parent / file).read_text())

    def freeze(self, path: str, seconds: float) -> bool:
        """Freeze cgroup ``path``; False if its processes are not frozen within ``seconds``. Blocks."""
        root = self.mounts.get("unified") or self.mounts["freezer"]
        return freezer.freeze(root / path.lstrip("/"), seconds)

    def thaw(self, path: str) -> None:
        """Thaw cgroup ``path`` and its descendants."""
        for folder in self._freezers(path):
            freezer.thaw(folder)

    def frozen_holder(self, path: str) -> str | None:
        """The folder of the frozen cgroup that keeps killed processes of ``path`` from ending.

        None if there is none.
        """
        if self.version == 2:
            return None  # with version 2 SIGKILL also ends frozen processes
        for folder, root in zip(self._freezers(path), self._freezers("/"), strict=True):
            if (folder / "freezer.state").exists() and (holder := freezer.frozen_by(folder, root)) is not None:
                return str(holder)
        return None

    def kill(self, path: str) -> int:
        """Send SIGKILL to every process in cgroup ``path``, and thaw it. Returns the number of processes."""
        if self.version == 2:
            with contextlib.suppress(OSError):
                (self.mounts["unified"] / path.lstrip("/") / "cgroup.kill").write_text("1")
        pids = self.processes(path)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.thaw(path)
        return len(pids)

    def remove(self, path: str) -> None:
        """Remove cgroup ``path`` and its empty descendants in every hierarchy. A busy or missing one is no error."""
        for folder in self.folders(path):
            _remove_below(folder)
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _remove_base(self, path: str) -> None:
        """Remove cgroup ``path`` and its empty descendants, except cgroups of pods, which belong to another agent."""
        for folder in self.folders(path):
            with contextlib.suppress(OSError):
                for entry in os.scandir(folder):
                    if entry.is_dir() and not _ID.fullmatch(entry.name):
                        self.remove(f"{path.rstrip('/')}/{entry.name}")
                folder.rmdir()

    def exists(self, path: str) -> bool:
        """Whether cgroup ``path`` exists in any hierarchy."""
        return any(folder.is_dir() for folder in self.folders(path))


def _slice_stem(base: str) -> str:
    return base.strip("/").removesuffix(".slice").replace("/", "-")


def _open_folder(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None


def _processes_below(path: Path) -> Iterator[list[int]]:
    """The processes of a cgroup and of each descendant. A container may have nested cgroups to any depth."""
    root = _open_folder(path)
    if root is None:
        return
    try:
        yield _processes_in(root, "cgroup.procs")
        for step in Walk(root):
            if step.entry is not None and step.entry.is_dir(follow_symlinks=False):
                yield _processes_in(step.folder, f"{step.name}/cgroup.procs")
    finally:
        os.close(root)


def _processes_in(folder: int, file: str) -> list[int]:
    try:
        with open(os.open(file, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder), "rb") as pids:
            return [int(pid) for pid in pids.read().split()]
    except OSError:
        return []


def _remove_below(path: Path) -> None:
    root = _open_folder(path)
    if root is None:
        return
    try:
        for step in Walk(root):
            if step.entry is None:
                with contextlib.suppress(OSError):
                    os.rmdir(step.name, dir_fd=step.folder)
    finally:
        os.close(root)
