"""Resolves the destinations of a container's mounts, so that the OCI runtime gets them without links of the image."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path

import msgspec

from host.errors import InvalidArgumentError
from runtime.specgen import config
from runtime.specgen.mounts.configured import in_order
from runtime.specgen.mounts.container_paths import ContainerPaths, Place
from runtime.specgen.mounts.image_volumes import Volume, volume_mounts

_ROUNDS = 8
_CONFIGURED = "mounts: container_path"


@dataclass(frozen=True, slots=True, kw_only=True)
class MountGroups:
    """The mounts of a container by their origin. Their destinations may lead through links.

    ``described`` are those of CDI devices. ``adjusted`` are those of plugins, each with its name for errors.
    ``folders`` maps the source of a mount that is bind mounted later to the present folder of its content.
    """

    defaults: Sequence[config.Mount]
    volumes: Sequence[Volume]
    configured: Sequence[config.Mount]
    described: Sequence[config.Mount] = ()
    adjusted: Sequence[tuple[str, config.Mount]] = ()
    folders: Mapping[str, str] = field(default_factory=dict)


def changed_groups(
    groups: MountGroups,
    volume_mounts: Sequence[config.Mount],
    mounts: Sequence[config.Mount],
    asked_by: Mapping[str, str],
) -> MountGroups:
    """``groups`` without the mounts that are no longer among ``mounts``, and with the new ones there.

    ``volume_mounts`` are those of the volumes of ``groups``. ``asked_by`` names new mounts in errors, by destination. A
    mount that another one hides is not among ``mounts`` either, and is left out.
    """
    kept = {id(mount) for mount in mounts}
    known = {id(mount) for mount in (*groups.defaults, *volume_mounts, *groups.configured)}
    return replace(
        groups,
        defaults=[mount for mount in groups.defaults if id(mount) in kept],
        volumes=[volume for volume, mount in zip(groups.volumes, volume_mounts, strict=True) if id(mount) in kept],
        configured=[mount for mount in groups.configured if id(mount) in kept],
        adjusted=[(asked_by.get(mount.destination, "mount"), mount) for mount in mounts if id(mount) not in known],
    )


@dataclass(frozen=True, slots=True)
class SettledMounts:
    """All mounts in order with destinations without links, and the paths of a container with these mounts.

    ``volumes`` are those on which nothing else is mounted. ``nested`` are destinations in another volume, which others
    may change before the OCI runtime mounts there. ``names`` has, by destination, the names for errors of the mounts
    that the configuration does not name so: those that a link led there, with the link, and those of others.
    """

    mounts: list[config.Mount]
    volumes: tuple[Volume, ...]
    paths: ContainerPaths
    nested: tuple[str, ...]
    names: Mapping[str, str]


def settle(rootfs: Path, groups: MountGroups) -> SettledMounts:
    """Resolve every destination below ``rootfs``.

    Raises InvalidArgumentError, with the link, if a link leads one over /proc, /sys, /dev or the root.
    """
    wanted = [_Planned(mount, "the agent's mount at", _folder(mount, groups.folders)) for mount in groups.defaults]
    wanted += [_Planned(mount, "VOLUME of the image:") for mount in volume_mounts(groups.volumes)]
    wanted += [_Planned(mount, _CONFIGURED, _folder(mount, groups.folders)) for mount in groups.configured]
    wanted += [_Planned(mount, "CDI: mount", _folder(mount, groups.folders)) for mount in groups.described]
    wanted += [_Planned(mount, what, _folder(mount, groups.folders)) for what, mount in groups.adjusted]
    links: dict[int, str] = {}
    destinations, paths, nested = _resolved(rootfs, wanted, links)
    mounts = [
        plan.mount
        if plan.mount.destination == destination
        else msgspec.structs.replace(plan.mount, destination=destination)
        for plan, destination in zip(wanted, destinations, strict=True)
    ]
    first, configured = len(groups.defaults), len(groups.defaults) + len(groups.volumes)
    defaults = [mount for mount in mounts[:first] if not _has_no_place(mount, paths)]
    described = configured + len(groups.configured)
    taken = {mount.destination for mount in mounts[configured:described]}
    kept = [mount.destination not in taken for mount in mounts[first:configured]]
    ordered = in_order(defaults, [*compress(mounts[first:configured], kept), *mounts[configured:described]])
    adjusted = described + len(groups.described)
    for later in (mounts[described:adjusted], mounts[adjusted:]):
        if later:
            ordered = in_order(ordered, later)
    names = {
        destination: plan.name(links.get(index, ""), destination)
        for index, (plan, destination) in enumerate(zip(wanted, destinations, strict=True))
        if index in links or plan.what != _CONFIGURED
    }
    return SettledMounts(ordered, tuple(compress(groups.volumes, kept)), paths, nested, names)


def _has_no_place(mount: config.Mount, paths: ContainerPaths) -> bool:
    """Whether it is the cgroup mount, in a volume at /sys/fs without a folder for it.

    An OCI runtime would create the folder in the volume, which is not permitted in a user namespace.
    """
    if mount.type != "cgroup":
        return False
    place = paths.resolve(mount.destination)
    return place.in_volume and not place.exists


@dataclass(frozen=True, slots=True)
class _Planned:
    """A mount, its name for errors, and the folder of its content; empty if that is the image's or the kernel's."""

    mount: config.Mount
    what: str
    folder: str = ""

    def name(self, link: str, destination: str) -> str:
        """Its name for errors, with the link that leads it to ``destination``."""
        name = f"{self.what} {self.mount.destination}"
        return f"{name}: the link {link} leads to {destination}" if link else name


def _folder(mount: config.Mount, folders: Mapping[str, str]) -> str:
    return folders.get(mount.source, mount.source) if mount.type == "bind" else ""


def _require_same_kind(plan: _Planned, place: Place) -> None:
    """Refuse a mount of a folder on a file, or of a file on a folder: here the mount still has a name for the error."""
    if place.blocked_by:
        raise InvalidArgumentError(
            f"{plan.what} {plan.mount.destination}: {place.blocked_by} is a file: mount at another path"
        )
    if not place.exists or plan.mount.type != "bind":
        return
    # A missing place, such as the folder of a VOLUME, will be created as a folder.
    folder = not plan.folder or _is_or_will_be_folder(plan.folder)
    if folder is not place.is_folder:
        kinds = ("a file", "a folder")
        raise InvalidArgumentError(
            f"{plan.what} {plan.mount.destination}: {place.path} is {kinds[place.is_folder]} in the container, and "
            f"{plan.folder or 'a volume'} is {kinds[folder]}: mount at another path"
        )


def _is_or_will_be_folder(path: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)  # noqa: PTH116 - takes a third of pathlib's time
    except OSError:
        return True


def _resolved(
    rootfs: Path, wanted: Sequence[_Planned], links: dict[int, str]
) -> tuple[list[str], ContainerPaths, tuple[str, ...]]:
    """The destinations, parents resolved first: a mount there may have links to the destinations of others.

    The third value is the destinations in another volume. The link that led a mount of ``wanted`` elsewhere is put into
    ``links`` by its index.
    """
    destinations = [plan.mount.destination for plan in wanted]
    for _ in range(_ROUNDS):
        paths, nested = ContainerPaths(rootfs), list[str]()
        found = list(destinations)
        for index in sorted(range(len(wanted)), key=lambda index: destinations[index].count("/")):
            place = paths.destination(destinations[index], wanted[index].what)
            _require_same_kind(wanted[index], place)
            found[index] = place.path
            if place.link:
                links.setdefault(index, place.link)
            if place.in_volume:
                nested.append(place.path)
            if wanted[index].folder:
                paths.add(place.path, wanted[index].folder)
        if found == destinations:
            return destinations, paths, tuple(nested)
        destinations = found
    raise InvalidArgumentError("mounts: links in volumes lead to each other's mount points: mount at plain folders")
