"""What the processes of a checkpoint would be allowed: no more than the new container's configuration allows.

CRIU gives restored processes the rights that its images say. The images come from an archive that anybody may have
written, so each of these rights is compared with the spec that the configuration makes. Blocks.
"""

from __future__ import annotations

import base64
import re
import stat
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from host.errors import InvalidArgumentError, UnsupportedError
from images.archives.files import BoundedTarInfo
from proto.criu.v1 import images_pb2
from runtime.checkpoint.restore import criu_images
from runtime.specgen import config
from runtime.specgen.capabilities import NAMES

_CORE = re.compile(r"core-\d+\.img")
_MOUNTS = re.compile(r"mountpoints-\d+\.img")
_TMPFS = re.compile(r"tmpfs-.*")
_FILTERED = 2
# Kinds of open files (fd_types of CRIU's fdinfo.proto) that give nothing which the container could not open itself.
_REGULAR, _INTERNET = 1, 4
_FILES = {_REGULAR, 2, 3, _INTERNET, 5, 6, 7, 8, 9, 17, 18}
_SOCKETS = {1, 2}  # streams and datagrams; raw ones need a capability that the processes may not have
_DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
_NAMESPACES = {
    "mount": "mnt_ns_id",
    "pid": "pid_ns_id",
    "network": "net_ns_id",
    "ipc": "ipc_ns_id",
    "uts": "uts_ns_id",
    "user": "user_ns_id",
}
_OTHER_NODES = {(5, 1), (5, 2)}
# File systems (fstype of mnt.proto) by the types of OCI mounts.
_KINDS = {1: "proc", 2: "sysfs", 5: "tmpfs", 6: "devpts", 12: "cgroup", 14: "mqueue", 23: "cgroup"}
_FLAGS = {"ro": 1, "nosuid": 2, "nodev": 4, "noexec": 8}
_MOST_IN_TMPFS = 20_000


def check_rights(folder: Path, spec: config.Spec) -> int:
    """Compare all images in ``folder``, as CRIU wrote them, with ``spec``; returns the number of their cgroup set.

    Raises InvalidArgumentError for a right that the configuration does not give, UnsupportedError for what cannot be
    compared.
    """
    if spec.process.selinux_label:
        raise UnsupportedError("a container with an SELinux label cannot be restored")
    cores = [
        core
        for path in sorted(folder.iterdir())
        if _CORE.fullmatch(path.name)
        for core in criu_images.entries(path, images_pb2.Core)
    ]
    if not cores:
        raise InvalidArgumentError("the checkpoint has no processes")
    wanted = _wanted_filter(spec)
    programs = criu_images.entries(folder / "seccomp.img", images_pb2.Seccomp)
    filters = [item for entry in programs for item in entry.seccomp_filters]
    for core in cores:
        _check_thread(core, spec.process)
        if spec.linux.seccomp is not None and not _has_filter(core, filters, wanted):
            raise InvalidArgumentError("a process of the checkpoint has not the seccomp profile of the configuration")
    _check_namespaces(folder, cores, spec)
    _check_files(criu_images.entries(folder / "files.img", images_pb2.File))
    mounts = [
        mount
        for path in sorted(folder.iterdir())
        if _MOUNTS.fullmatch(path.name)
        for mount in criu_images.entries(path, images_pb2.Mount)
    ]
    _check_mounts(mounts, spec)
    for path in sorted(folder.iterdir()):
        if _TMPFS.fullmatch(path.name):
            _check_tmpfs(path)
    sets = {core.thread_core.cg_set or core.tc.cg_set for core in cores}
    if len(sets) != 1:
        raise UnsupportedError("its processes were in several cgroups, which are not restored")
    return sets.pop()


def _check_thread(core: images_pb2.Core, process: config.Process) -> None:
    credentials = core.thread_core.creds
    if not core.HasField("thread_core") or not core.thread_core.HasField("creds"):
        raise InvalidArgumentError("a process of the checkpoint has no credentials")
    user, users = process.user.uid, {credentials.uid, credentials.euid, credentials.suid, credentials.fsuid}
    if user and users != {user}:
        raise InvalidArgumentError(f"a process of the checkpoint has not the user {user} of the configuration")
    given = process.capabilities or config.Capabilities()
    bounding, permitted = set(given.bounding), {*given.permitted, *given.ambient}
    for words, allowed in (
        (credentials.cap_bnd, bounding),
        (credentials.cap_inh, bounding),
        (credentials.cap_prm, permitted),
        (credentials.cap_eff, permitted),
    ):
        more = _names(words) - allowed
        if more:
            raise InvalidArgumentError(
                f"a process of the checkpoint has capabilities that the configuration does not give: "
                f"{', '.join(sorted(more))}"
            )
    if process.no_new_privileges and not credentials.no_new_privs:
        raise InvalidArgumentError("a process of the checkpoint may gain privileges, which the configuration forbids")
    if process.apparmor_profile and credentials.lsm_profile != process.apparmor_profile:
        raise InvalidArgumentError(
            f"a process of the checkpoint is not under the AppArmor profile {process.apparmor_profile!r}"
        )


def _names(words: Iterable[int]) -> set[str]:
    bits = sum(word << 32 * index for index, word in enumerate(words))
    known = {name for number, name in enumerate(NAMES) if bits >> number & 1}
    return known | ({"unknown ones"} if bits >> len(NAMES) else set())


def _wanted_filter(spec: config.Spec) -> bytes:
    encoded = spec.annotations.get("run.oci.seccomp_bpf_data", "")
    if spec.linux.seccomp is not None and not encoded:
        raise UnsupportedError("its seccomp profile cannot be compared with that of the checkpoint")
    return base64.b64decode(encoded)


def _has_filter(core: images_pb2.Core, filters: list[images_pb2.SeccompFilter], wanted: bytes) -> bool:
    """Whether the filter is among those of a thread, each of which names the one before it."""
    thread = core.thread_core
    if thread.seccomp_mode != _FILTERED or not thread.HasField("seccomp_filter"):
        return False
    number: int | None = thread.seccomp_filter
    for _ in filters:
        if number is None or number >= len(filters):
            return False
        if filters[number].filter == wanted:
            return True
        number = filters[number].prev if filters[number].HasField("prev") else None
    return False


def _check_namespaces(folder: Path, cores: Iterable[images_pb2.Core], spec: config.Spec) -> None:
    """All processes are in the container's namespaces: the same, and none of those that CRIU runs in."""
    (inventory,) = _single(folder / "inventory.img", images_pb2.Inventory)
    outside = inventory.root_ids
    found = [core.ids for core in cores if core.HasField("ids")]
    for path in folder.glob("ids-*.img"):
        found += criu_images.entries(path, images_pb2.Namespaces)
    if not found:
        raise InvalidArgumentError("the checkpoint does not say in which namespaces its processes are")
    if any(path for path in folder.glob("userns-*.img")):
        raise UnsupportedError("the checkpoint has a user namespace, which is not restored")
    own = {namespace.type for namespace in spec.linux.namespaces} | {"mount"}
    for ids in found:
        for kind, member in _NAMESPACES.items():
            number = getattr(ids, member)
            if number != getattr(found[0], member):
                raise UnsupportedError(f"processes of the checkpoint have other {kind} namespaces than their container")
            if (number != getattr(outside, member)) != (kind in own) or not ids.HasField(member):
                raise InvalidArgumentError(f"the {kind} namespace of the checkpoint is not that of the configuration")


def _single(path: Path, kind: type[images_pb2.Inventory]) -> list[images_pb2.Inventory]:
    found = list(criu_images.entries(path, kind, criu_images.INVENTORY_MAGIC))
    if len(found) != 1 or not found[0].HasField("root_ids"):
        raise InvalidArgumentError(f"the checkpoint's {path.name} is broken")
    return found


def _check_files(files: Iterable[images_pb2.File]) -> None:
    for file in files:
        if file.type not in _FILES:
            raise UnsupportedError(
                f"a process of the checkpoint has something open that is not restored (CRIU: {file.type})"
            )
        if file.type == _INTERNET and file.isk.type not in _SOCKETS:
            raise InvalidArgumentError("a process of the checkpoint has a raw socket open")
        if file.type != _REGULAR:
            continue
        mode, name = file.reg.mode, file.reg.name
        if not mode:
            raise InvalidArgumentError("the checkpoint does not say what kind of file a process has open")
        device = stat.S_ISCHR(mode) and name.startswith("/dev/") and name[5:] in _DEVICES
        if (stat.S_ISBLK(mode) or stat.S_ISCHR(mode)) and not device:
            raise InvalidArgumentError(f"a process of the checkpoint has the device {name[:100]!r} open")


def _check_mounts(mounts: Iterable[images_pb2.Mount], spec: config.Spec) -> None:
    """Every mount of the checkpoint is one that the spec makes, and is not less restricted."""
    wanted = {mount.destination.rstrip("/") or "/": mount for mount in spec.mounts}
    seen: dict[str, int] = {}
    for mount in mounts:
        place = mount.mountpoint.removeprefix(".").rstrip("/") or "/"
        seen[place] = mount.flags
        if mount.with_plugin:
            raise UnsupportedError(f"the checkpoint has a mount at {place[:100]} that a plugin of CRIU makes")
        if mount.ext_key and mount.ext_key.rstrip("/") != place:
            raise InvalidArgumentError(f"the checkpoint has a mount at {place[:100]} that belongs elsewhere")
        if place != "/" and not mount.ext_key and not _is_wanted(mount, place, spec, wanted):
            raise InvalidArgumentError(f"the checkpoint has a mount at {place[:100]} that the configuration has not")
        if place in wanted and not mount.ext_key:
            _check_flags(place, mount.flags, wanted[place].options)
    for place in wanted:
        if place not in seen:
            raise InvalidArgumentError(
                f"the configuration mounts {place[:100]}, where the checkpoint has nothing: its mounts must be the same"
            )
    _check_restricted(seen, spec)


def _is_wanted(mount: images_pb2.Mount, place: str, spec: config.Spec, wanted: Mapping[str, config.Mount]) -> bool:
    """Whether the spec makes the mount, as it is or as one of a folder of them."""
    kind = _KINDS.get(mount.fstype)
    given = wanted[place].type if place in wanted else ""
    above = wanted.get(place.rpartition("/")[0])
    return (
        (kind is not None and given == kind)
        or (kind == "tmpfs" and (given == "cgroup" or place in spec.linux.masked_paths))
        or (kind == "cgroup" and above is not None and above.type == "cgroup")
        or (kind == "proc" and place in spec.linux.readonly_paths)
    )


def _check_restricted(seen: Mapping[str, int], spec: config.Spec) -> None:
    """What the configuration hides or does not let be written to is so in the checkpoint; ``seen`` are its mounts."""
    for place in spec.linux.readonly_paths:
        if Path(place).exists() and not seen.get(place, 0) & _FLAGS["ro"]:
            raise InvalidArgumentError(f"{place} is not read-only in the checkpoint, as the configuration wants it")
    for place in spec.linux.masked_paths:
        if Path(place).exists() and place not in seen:
            raise InvalidArgumentError(f"{place} is not hidden in the checkpoint, as the configuration wants it")
    if spec.root.readonly and not seen.get("/", 0) & _FLAGS["ro"]:
        raise InvalidArgumentError("the root file system is not read-only in the checkpoint")


def _check_flags(place: str, flags: int, options: Iterable[str]) -> None:
    for option in options:
        bit = _FLAGS.get(option, 0)
        # A hierarchy of version 1 is restricted itself, not the folder that it is in.
        if bit and not flags & bit and not (option == "ro" and place == "/sys/fs/cgroup"):
            raise InvalidArgumentError(f"the mount at {place} is without {option!r} in the checkpoint")


def _check_tmpfs(path: Path) -> None:
    """A file system in memory is restored from a tar file: it may hold the usual devices, and no others."""
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=BoundedTarInfo) as archive:
            for count, member in enumerate(archive):
                member.pax_headers = {}
                if count > _MOST_IN_TMPFS:
                    raise InvalidArgumentError(f"the checkpoint's {path.name} has too many members")
                _check_member(member, path.name)
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
        raise InvalidArgumentError(f"the checkpoint's {path.name} is broken: {error}") from error


def _check_member(member: tarfile.TarInfo, name: str) -> None:
    for path in (member.name, member.linkname) if member.islnk() else (member.name,):
        if path.startswith("/") or ".." in path.split("/"):
            raise InvalidArgumentError(f"the checkpoint's {name} holds a name that leads out of it")
    device = (member.devmajor, member.devminor)
    if member.isblk() or (member.ischr() and device not in {*_DEVICES.values(), *_OTHER_NODES}):
        raise InvalidArgumentError(f"the checkpoint's {name} holds the device {device[0]}:{device[1]}")
