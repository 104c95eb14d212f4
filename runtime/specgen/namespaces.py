"""The namespaces that a container joins or gets, and the id mappings of a user namespace."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from host.errors import InvalidArgumentError
from proto.runtime.v1 import cri_pb2
from runtime.specgen import config

_MAX_RANGES = 340


@dataclass(frozen=True, slots=True)
class NamespacePaths:
    """Where the pod's namespaces are pinned.

    For ``network``, ``ipc``, ``uts`` and ``user`` None means the node's own. For ``pid`` None means a new one for this
    container, and a path the one to join (of the pod's init or of the target container). ``host_pid`` means the node's.
    """

    network: str | None = None
    ipc: str | None = None
    uts: str | None = None
    user: str | None = None
    pid: str | None = None
    host_pid: bool = False


def namespaces(paths: NamespacePaths, *, own_cgroup_namespace: bool) -> list[config.Namespace]:
    """The list for the spec. The mount namespace is always the container's own."""
    wanted = [config.Namespace(type="mount")]
    if not paths.host_pid:
        wanted.append(config.Namespace(type="pid", path=paths.pid or ""))
    for kind, path in (("network", paths.network), ("ipc", paths.ipc), ("uts", paths.uts), ("user", paths.user)):
        if path is not None:
            wanted.append(config.Namespace(type=kind, path=path))
    if own_cgroup_namespace:
        wanted.append(config.Namespace(type="cgroup"))
    return wanted


def user_mappings(options: cri_pb2.NamespaceOption) -> tuple[list[config.IDMapping], list[config.IDMapping]] | None:
    """The checked uid and gid mappings of a pod's user namespace. None if it uses the node's."""
    if not options.HasField("userns_options") or options.userns_options.mode == cri_pb2.NamespaceMode.NODE:
        return None
    wanted = options.userns_options
    if wanted.mode != cri_pb2.NamespaceMode.POD:
        known = cri_pb2.NamespaceMode.DESCRIPTOR.values_by_number.get(wanted.mode)
        mode = known.name if known is not None else wanted.mode
        raise InvalidArgumentError(f"userns_options: mode {mode} is invalid for a user namespace: use POD or NODE")
    uids, gids = id_mappings(wanted.uids, "userns_options.uids"), id_mappings(wanted.gids, "userns_options.gids")
    for field, mappings in (("uids", uids), ("gids", gids)):
        if not any(mapping.container_id == 0 for mapping in mappings):
            raise InvalidArgumentError(f"userns_options.{field}: id 0 is not mapped: add a mapping from container id 0")
    return uids, gids


def id_mappings(given: Iterable[cri_pb2.IDMapping], field: str) -> list[config.IDMapping]:
    """The mappings for the spec. Refuses empty ranges, ranges past 2^32 and overlaps on either side."""
    mappings: list[config.IDMapping] = []
    for mapping in given:
        last = max(mapping.container_id, mapping.host_id) + mapping.length - 1
        if mapping.length == 0 or last >= 2**32:
            raise InvalidArgumentError(
                f"{field}: {mapping.length} ids from {mapping.container_id} to host {mapping.host_id} are no range: "
                "give a length of at least 1 that stays below 2^32"
            )
        mappings.append(
            config.IDMapping(container_id=mapping.container_id, host_id=mapping.host_id, size=mapping.length)
        )
    _refuse_too_many(mappings, field)
    _refuse_overlap([(mapping.container_id, mapping.size) for mapping in mappings], f"{field}: container ids")
    _refuse_overlap([(mapping.host_id, mapping.size) for mapping in mappings], f"{field}: host ids")
    return mappings


def map_file(mappings: Iterable[config.IDMapping]) -> str:
    """The text for the kernel's uid_map or gid_map (user_namespaces(7))."""
    return "".join(f"{mapping.container_id} {mapping.host_id} {mapping.size}\n" for mapping in mappings)


def _refuse_too_many(mappings: Sequence[config.IDMapping], field: str) -> None:
    size, most = len(map_file(mappings)), os.sysconf("SC_PAGE_SIZE") - 1
    if len(mappings) > _MAX_RANGES or size > most:
        raise InvalidArgumentError(
            f"{field}: {len(mappings)} ranges in {size} bytes are more than the {_MAX_RANGES} in {most} that "
            "the kernel takes: join ranges that follow each other"
        )


def _refuse_overlap(ranges: Sequence[tuple[int, int]], what: str) -> None:
    ordered = sorted(ranges)
    for (start, length), (following, _) in pairwise(ordered):
        if start + length > following:
            raise InvalidArgumentError(f"{what} {following} and up are mapped twice: make the ranges disjoint")
