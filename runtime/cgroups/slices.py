"""Slices and scopes of systemd (systemd.slice(5)): their names, their paths, and how they start and stop."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from host import processes
from host.errors import CommandError

_START_SECONDS = 20.0
_STOP_SECONDS = 30.0
_PROPERTY_SECONDS = 10.0
_RUNTIME_PROPERTIES = Path("/run/systemd/system.control")


# A shutdown of the node does not stop the scope: its processes end after those that they watch, or last. Nor does
# systemd stop it when the kernel killed one process for memory. Before 253 it never does, and has no property for it.
_SCOPE_PROPERTIES = ("Delegate=yes", "TasksMax=infinity", "DefaultDependencies=no")
_OOM_PROPERTY = "OOMPolicy=continue"


def systemd_is_init() -> bool:
    """Whether systemd manages this node (sd_booted(3))."""
    return Path("/run/systemd/system").is_dir()


def slice_name(parent: str) -> str:
    """The unit name of a cgroup parent. kubelet passes it with its path, other clients pass the name only."""
    return parent.rstrip("/").rpartition("/")[2]


def slice_path(name: str) -> str:
    """The path of a systemd slice: ``a-b.slice`` is in ``a.slice``."""
    return "".join(f"/{outer}" for outer in reversed(with_outer_slices(name)))


def with_outer_slices(name: str) -> list[str]:
    """A slice and its ancestors, innermost first, without the root slice."""
    if name == "-.slice":
        return []
    parts = name.removesuffix(".slice").split("-")
    return [f"{'-'.join(parts[:depth])}.slice" for depth in range(len(parts), 0, -1)]


async def start_scope(name: str, slice_of: str, description: str, holder: Sequence[str]) -> None:
    """Start a delegated scope that lasts as long as the process ``holder``, which runs in it. Raises CommandError."""
    try:
        await _start_scope(name, slice_of, description, holder, (*_SCOPE_PROPERTIES, _OOM_PROPERTY))
    except CommandError as error:
        if _OOM_PROPERTY.partition("=")[0] not in error.output:
            raise
        await _start_scope(name, slice_of, description, holder, _SCOPE_PROPERTIES)


async def _start_scope(
    name: str, slice_of: str, description: str, holder: Sequence[str], properties: Sequence[str]
) -> None:
    command = ["systemd-run", "--scope", "--collect", "--quiet", f"--unit={name}", f"--slice={slice_of}"]
    command += [f"--description={description}", *(f"--property={one}" for one in properties)]
    # systemd-run becomes the shell once the scope has started. Its status then says that the scope exists.
    command += ["/bin/sh", "-c", f"cd /; {shlex.join(holder)} </dev/null >/dev/null 2>&1 &"]
    await processes.run(command, timeout=_START_SECONDS)


async def stop_unit(name: str) -> None:
    """Stop a unit. An unknown one is no error."""
    await processes.run(["systemctl", "stop", "--", name], timeout=_STOP_SECONDS, check=False)


async def stop_slice(name: str) -> None:
    """Stop a slice by systemd, which otherwise keeps every slice that was ever used. An unknown slice is no error."""
    await stop_unit(name)
    if (_RUNTIME_PROPERTIES / f"{name}.d").exists():
        await processes.run(["systemctl", "revert", "--", name], timeout=_PROPERTY_SECONDS, check=False)


async def set_io_weight(name: str, weight: int) -> None:
    """Set the weight of a slice by systemd, also if it is not started (systemd.resource-control(5)).

    Raises CommandError.
    """
    command = ["systemctl", "set-property", "--runtime", "--", name, f"IOWeight={weight}"]
    await processes.run(command, timeout=_PROPERTY_SECONDS)
