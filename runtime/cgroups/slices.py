"""Slices of systemd (systemd.slice(5)): their names, their paths, and how they are stopped."""

from __future__ import annotations

from pathlib import Path

from host import processes

_STOP_SECONDS = 30.0
_PROPERTY_SECONDS = 10.0
_RUNTIME_PROPERTIES = Path("/run/systemd/system.control")


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


async def stop_slice(name: str) -> None:
    """Stop a slice by systemd, which otherwise keeps every slice that was ever used. An unknown slice is no error."""
    await processes.run(["systemctl", "stop", "--", name], timeout=_STOP_SECONDS, check=False)
    if (_RUNTIME_PROPERTIES / f"{name}.d").exists():
        await processes.run(["systemctl", "revert", "--", name], timeout=_PROPERTY_SECONDS, check=False)


async def set_io_weight(name: str, weight: int) -> None:
    """Set the weight of a slice by systemd, also if it is not started (systemd.resource-control(5)).

    Raises CommandError.
    """
    command = ["systemctl", "set-property", "--runtime", "--", name, f"IOWeight={weight}"]
    await processes.run(command, timeout=_PROPERTY_SECONDS)
