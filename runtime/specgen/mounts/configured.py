"""The mounts in the configuration, and the order of all mounts."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from host.errors import InvalidArgumentError, KubeletReasonError
from proto.runtime.v1 import cri_pb2
from runtime.specgen import config
from runtime.specgen.facts import HandlerFacts
from runtime.specgen.mounts import openat2
from runtime.specgen.mounts.host_paths import HostPaths, require_propagation
from runtime.specgen.mounts.idmapped import MappedVolume, mapped_volume
from runtime.specgen.node_facts import NodeFacts
from runtime.specgen.security.selinux import Relabel

_PROPAGATION = {
    cri_pb2.MountPropagation.PROPAGATION_PRIVATE: "rprivate",
    cri_pb2.MountPropagation.PROPAGATION_HOST_TO_CONTAINER: "rslave",
    cri_pb2.MountPropagation.PROPAGATION_BIDIRECTIONAL: "rshared",
}
# Relabelling one of these, or everything in it, would take files from the node's own services.
_SYSTEM_TREES = ("/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/proc", "/sbin", "/sys", "/usr")
_SYSTEM_FOLDERS = frozenset(
    (
        *_SYSTEM_TREES,
        *("/", "/home", "/media", "/mnt", "/opt", "/root", "/run", "/srv", "/tmp"),
        *("/var", "/var/lib", "/var/log", "/var/run", "/var/tmp"),
    )
)
_EXTRA_OPTIONS = ("noexec", "nodev", "nosuid")


def container_path(given: str, field: str) -> str:
    """Clean an absolute path inside a container. Refuses the root itself, relative paths and ``..``."""
    if not given.startswith("/") or "\0" in given:
        raise InvalidArgumentError(f"{field} {given!r} is not absolute: use a path that begins with /")
    if ".." in given.split("/"):
        raise InvalidArgumentError(f"{field} {given!r} has '..': use the path without it")
    cleaned = posixpath.normpath("/" + given.lstrip("/"))
    if cleaned == "/":
        raise InvalidArgumentError(f"{field} {given!r} is the root of the container: mount below it")
    return cleaned


def configured_mounts(
    mounts: Sequence[cri_pb2.Mount],
    image_mounts: Mapping[int, Path],
    host_paths: HostPaths,
    handler: HandlerFacts,
    node: NodeFacts,
    *,
    mapped_folder: Path,
) -> tuple[list[config.Mount], list[MappedVolume]]:
    """One bind mount per entry, in their order, and the volumes that must first be bind mounted in ``mapped_folder``.

    ``image_mounts`` has the prepared folder of each image mount.
    """
    result, mapped = [], []
    for index, mount in enumerate(mounts):
        destination = container_path(mount.container_path, "mounts: container_path")
        options = ["rbind", _propagation(mount), _write_option(mount, handler, node), *_extra_options(mount)]
        if mount.image.image:
            source = _image_source(mount, destination, image_mounts.get(index))
        else:
            source = host_paths.resolve(mount.host_path)
        if options[1] != "rprivate":
            require_propagation(source, shared=options[1] == "rshared")
        if not mount.image.image and (volume := mapped_volume(mount, source, mapped_folder / str(index))) is not None:
            mapped.append(volume)
            source = str(volume.target)
        result.append(config.Mount(destination=destination, type="bind", source=source, options=options))
    return result, mapped


def root_propagation(mounts: Sequence[cri_pb2.Mount]) -> str:
    """The propagation of the container's root that these mounts need. Empty for the OCI runtime's default.

    For bidirectional mounts it is ``shared`` and not ``rshared``: crun would share the container's private mounts too.
    """
    wanted = {mount.propagation for mount in mounts}
    if cri_pb2.MountPropagation.PROPAGATION_BIDIRECTIONAL in wanted:
        return "shared"
    return "rslave" if cri_pb2.MountPropagation.PROPAGATION_HOST_TO_CONTAINER in wanted else ""


def in_order(defaults: Iterable[config.Mount], configured: Sequence[config.Mount]) -> list[config.Mount]:
    """All mounts, parents before the mounts inside them, otherwise in the given order.

    A configured mount replaces a default one at the same path. One at /dev or /proc replaces all default ones below it.
    """
    taken = {mount.destination for mount in configured}
    whole = tuple(path + "/" for path in ("/dev", "/proc") if path in taken)
    kept = [m for m in defaults if m.destination not in taken and not (whole and m.destination.startswith(whole))]
    return sorted((*kept, *configured), key=lambda mount: mount.destination.count("/"))


def _propagation(mount: cri_pb2.Mount) -> str:
    try:
        return _PROPAGATION[mount.propagation]
    except KeyError:
        raise InvalidArgumentError(
            f"mounts: {mount.container_path}: propagation {mount.propagation} is unknown: use one CRI names"
        ) from None


def _write_option(mount: cri_pb2.Mount, handler: HandlerFacts, node: NodeFacts) -> str:
    if not mount.recursive_read_only:
        return "ro" if mount.readonly else "rw"
    if not mount.readonly:
        raise InvalidArgumentError(f"mounts: {mount.container_path}: recursive_read_only needs readonly to be set too")
    if mount.propagation != cri_pb2.MountPropagation.PROPAGATION_PRIVATE:
        raise InvalidArgumentError(f"mounts: {mount.container_path}: recursive_read_only needs private propagation")
    if not (handler.recursive_read_only and node.recursive_read_only):
        lacking = (
            f"runtime handler {handler.name!r}" if node.recursive_read_only else "this node's kernel (before 5.12)"
        )
        raise KubeletReasonError(
            "RROUnsupported",
            f"mount {mount.container_path} is to be recursively read-only, which {lacking} cannot do: "
            "use recursiveReadOnly IfPossible, or another handler",
        )
    return "rro"


def _extra_options(mount: cri_pb2.Mount) -> list[str]:
    for option in mount.mount_options:
        if option not in _EXTRA_OPTIONS:
            allowed = ", ".join(_EXTRA_OPTIONS)
            raise InvalidArgumentError(
                f"mounts: {mount.container_path}: mount option {option!r} is not allowed: use any of {allowed}"
            )
    return sorted(set(mount.mount_options))


def _image_source(mount: cri_pb2.Mount, destination: str, prepared: Path | None) -> str:
    if mount.host_path:
        raise InvalidArgumentError(f"mounts: {destination}: an image mount has no host_path: set only one of them")
    if not mount.readonly:
        raise InvalidArgumentError(f"mounts: {destination}: an image mount is read-only: set readonly")
    if prepared is None:
        raise KubeletReasonError(
            "ImageVolumeMountFailed", f"image {mount.image.image} for {destination} is missing: pull it first"
        )
    if not mount.image_sub_path:
        return str(prepared)
    if mount.image_sub_path.startswith("/") or ".." in mount.image_sub_path.split("/"):
        raise InvalidArgumentError(
            f"mounts: {destination}: image_sub_path {mount.image_sub_path!r} must be relative and without '..'"
        )
    try:
        with openat2.locate(prepared, mount.image_sub_path) as descriptor:
            return str(Path(f"/proc/self/fd/{descriptor}").readlink())
    except OSError as error:
        raise KubeletReasonError(
            "ImageVolumeMountFailed",
            f"image {mount.image.image} for {destination} has no {mount.image_sub_path!r}: correct the sub path",
        ) from error


def volumes_to_relabel(mounts: Iterable[cri_pb2.Mount], host_paths: HostPaths, label: str) -> Iterator[Relabel]:
    """The volumes whose configuration requests the container's label; none without a label.

    Raises InvalidArgumentError for folders of the system, which must keep their labels. This also holds without
    SELinux, so that a pod does not depend on it.
    """
    for mount in mounts:
        if not mount.selinux_relabel or mount.image.image:
            continue
        path = host_paths.resolve(mount.host_path)
        if path in _SYSTEM_FOLDERS or path.startswith(tuple(f"{tree}/" for tree in _SYSTEM_TREES)):
            raise InvalidArgumentError(
                f"mounts: {mount.container_path}: {path} belongs to the system and cannot be relabelled for a "
                "container: mount another folder, or leave out selinux_relabel"
            )
        if label:
            yield Relabel(path, label)
