"""Mounts in bidirectional volumes, which also appear on the node."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from runtime.specgen import config

_SHARED = frozenset(("shared", "rshared"))


def targets_on_node(mounts: Sequence[config.Mount]) -> list[str]:
    """Where mounts of a container appear on the node because they are directly in a volume that shares its mounts."""
    by_place = {mount.destination: mount for mount in mounts}
    found: list[str] = []
    for destination in by_place:
        volume = _sharing_volume(destination, by_place)
        if volume is not None:
            found.append(volume.source.rstrip("/") + destination[len(volume.destination) :])
    return found


def without_shared_mounts(mounts: list[config.Mount], own: Iterable[config.Mount]) -> list[config.Mount]:
    """``mounts`` without the files of the agent (``own``) that would appear on the node.

    In a bidirectional volume the pod's resolv.conf would be mounted on the node's.
    """
    by_place = {mount.destination: mount for mount in mounts}
    sources = {mount.source for mount in own if mount.type == "bind"}
    return [
        mount for mount in mounts if mount.source not in sources or _sharing_volume(mount.destination, by_place) is None
    ]


def _sharing_volume(destination: str, by_place: Mapping[str, config.Mount]) -> config.Mount | None:
    """The innermost mount that ``destination`` is in, if it shares its mounts with the node."""
    folder = destination.rpartition("/")[0]
    while folder and folder not in by_place:
        folder = folder.rpartition("/")[0]
    volume = by_place.get(folder)
    return volume if volume is not None and volume.type == "bind" and _SHARED.intersection(volume.options) else None
