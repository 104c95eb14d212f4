"""Host paths of mounts: resolved, checked for propagation, and created if they are missing."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from host.errors import InvalidArgumentError
from host.files.mounts import MountEntry, mount_id, mount_table


@dataclass(slots=True)
class HostPaths:
    """Resolves the sources of one container's mounts. ``make`` creates missing folders at the end."""

    missing: list[str] = field(default_factory=list)

    def resolve(self, host_path: str) -> str:
        """Resolve the symbolic links of ``host_path``. If it does not exist, ``make`` will create it as a folder."""
        if not host_path.startswith("/") or "\0" in host_path:
            raise InvalidArgumentError(
                f"mounts: host_path {host_path!r} is not absolute: use the full path on the node"
            )
        try:
            return os.path.realpath(host_path, strict=True)
        except FileNotFoundError:
            return self._missing(host_path)
        except OSError as error:
            raise InvalidArgumentError(f"mounts: host_path {host_path} cannot be used: {error.strerror}") from error

    def _missing(self, host_path: str) -> str:
        resolved = os.path.realpath(host_path)
        if Path(host_path).is_symlink():
            raise InvalidArgumentError(
                f"mounts: host_path {host_path} is a symbolic link to {resolved}, which does not exist: make its target"
            )
        self.missing.append(resolved)
        return resolved

    def make(self) -> None:
        """Create missing paths as folders. They are never removed, as with every other node agent."""
        for path in self.missing:
            try:
                Path(path).mkdir(mode=0o755, parents=True, exist_ok=True)
            except OSError as error:
                raise InvalidArgumentError(
                    f"mounts: host_path {path} does not exist and cannot be made as a folder: {error.strerror}"
                ) from error


def require_propagation(source: str, *, shared: bool) -> None:
    """Check that the mount of ``source`` propagates mounts (``shared``), or at least receives them.

    For a missing source, its nearest existing parent is checked. Raises InvalidArgumentError.
    """
    existing = Path(source)
    while not os.path.lexists(existing):
        existing = existing.parent
    entry = _mount_of(existing)
    if shared and not entry.shared:
        raise InvalidArgumentError(
            f"mounts: path {source} is mounted on {entry.target} but it is not a shared mount: "
            f"run mount --make-rshared {entry.target} on the node, or use another propagation"
        )
    if not shared and not (entry.shared or entry.slave):
        raise InvalidArgumentError(
            f"mounts: path {source} is mounted on {entry.target} but it is not a shared or slave mount: "
            f"run mount --make-rshared {entry.target} on the node, or use private propagation"
        )


def _mount_of(path: Path) -> MountEntry:
    """The mount of ``path``, by the kernel's mount id, which is correct even if mounts hide each other."""
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        number = mount_id(descriptor)
    finally:
        os.close(descriptor)
    for entry in mount_table():
        if entry.mount_id == number:
            return entry
    raise InvalidArgumentError(f"mounts: path {path} is on a mount this agent does not see: use another host_path")
