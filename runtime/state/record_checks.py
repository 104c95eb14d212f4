"""Checks that the names in a row can be this agent's own: the agent kills and removes what they name."""

from __future__ import annotations

from runtime.state.container import Container
from runtime.state.sandbox import Sandbox

# Below the cgroup with the id there is at most one more: the one that crun makes in a scope.
_DEPTH = 2


def check_sandbox(sandbox: Sandbox) -> None:
    """Raise ValueError if a sandbox's record names objects that are not the sandbox's own."""
    record = sandbox.record
    if record.owns_cgroup_parent and not _names_own(record.cgroup_parent, sandbox.id):
        raise ValueError(f"its cgroup {record.cgroup_parent!r} is not its own")
    _check_handler(record.handler)


def check_container(container: Container) -> None:
    """Raise ValueError if a container's record names objects that are not the container's own."""
    record = container.record
    if not _names_own(record.cgroup, container.id):  # all processes in it are killed when the container ends
        raise ValueError(f"its cgroup {record.cgroup!r} is not its own")
    _check_handler(record.handler)


def _names_own(path: str, object_id: str) -> bool:
    """Whether a cgroup or slice has the id in its last parts, and no part leads elsewhere."""
    parts = path.lstrip("/").split("/")
    return ".." not in parts and any(object_id in part for part in parts[-_DEPTH:])


def _check_handler(name: str) -> None:
    if name in ("", ".", "..") or "/" in name:  # a folder is named after it
        raise ValueError(f"its runtime handler {name!r} is no name")
