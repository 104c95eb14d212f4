"""Frozen cgroups. Their processes do not run until they are thawed. On cgroup v1 not even a kill ends them before.

A cgroup is frozen itself, or because an ancestor is. The files are freezer.state on version 1 and cgroup.freeze on
version 2 (the kernel's cgroup-v1/freezer-subsystem.rst and cgroup-v2.rst).
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from pathlib import Path

from host.files.file_tree import Walk

_OWN = ("freezer.self_freezing", "cgroup.freeze")
_ATTEMPTS_BEFORE_THAW = 25
_THAWS = (("freezer.state", b"THAWED"), ("cgroup.freeze", b"0"))


def is_frozen(folder: Path) -> bool:
    """Whether the cgroup ``folder`` is frozen or being frozen, itself or by an ancestor."""
    state = _content(folder / "freezer.state")
    if state:
        return state != b"THAWED"
    return b"frozen 1" in _content(folder / "cgroup.events").splitlines() or _content(folder / "cgroup.freeze") == b"1"


def frozen_by(folder: Path, root: Path) -> Path | None:
    """The nearest cgroup from ``folder`` up to ``root`` that is itself frozen; None if there is none."""
    for group in (folder, *folder.parents):
        if any(_content(group / name) == b"1" for name in _OWN):
            return group
        if group == root:
            return None
    return None


def freeze(folder: Path, seconds: float) -> bool:
    """Freeze the cgroup ``folder`` and wait until all its processes are frozen. False if that takes too long.

    Version 1 can miss a process that forks at this moment, and stays at FREEZING for ever. So this writes FROZEN
    again, and thaws in between if that does not help. Blocks.
    """
    legacy = (folder / "freezer.state").exists()
    file, value = (folder / "freezer.state", b"FROZEN") if legacy else (folder / "cgroup.freeze", b"1")
    if not _set(file, value):
        return False
    deadline = time.monotonic() + seconds
    pause = 0.0005
    attempts = 0
    while not _is_fully_frozen(folder):
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)  # the kernel has an event for it only with version 2
        pause = min(2 * pause, 0.02)
        attempts += 1
        if legacy and attempts % _ATTEMPTS_BEFORE_THAW == 0:
            _set(file, b"THAWED")
        if legacy and not _set(file, value):
            return False
    return True


def _set(file: Path, value: bytes) -> bool:
    """Write to a file of a cgroup; False if the cgroup is gone."""
    try:
        file.write_bytes(value)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV, errno.EACCES):
            raise
        return False
    return True


def _is_fully_frozen(folder: Path) -> bool:
    state = _content(folder / "freezer.state")
    return state == b"FROZEN" if state else b"frozen 1" in _content(folder / "cgroup.events").splitlines()


def thaw(folder: Path) -> None:
    """Thaw the cgroup ``folder`` and its descendants, which a container may have frozen. A missing one is no error."""
    try:
        root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        _thaw_in(root, "")
        for step in Walk(root):
            if step.entry is not None and step.entry.is_dir(follow_symlinks=False):
                _thaw_in(step.folder, f"{step.name}/")
    finally:
        os.close(root)


def _thaw_in(folder: int, prefix: str) -> None:
    for own, (name, value) in zip(_OWN, _THAWS, strict=True):
        with contextlib.suppress(OSError):
            if _read(folder, prefix + own) == b"1":
                _write(folder, prefix + name, value)


def _read(folder: int, name: str) -> bytes:
    file = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        return os.read(file, 64).strip()
    finally:
        os.close(file)


def _write(folder: int, name: str, value: bytes) -> None:
    file = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        os.write(file, value)
    finally:
        os.close(file)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes().strip()
    except OSError:
        return b""
