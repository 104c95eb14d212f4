"""Compares the rights of a checkpoint's processes with the rights in the new container's configuration.

CRIU gives restored processes the rights in its images. The images are from an archive that anyone may have written. So
each right is compared with the spec of the configuration. Blocks.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable
from pathlib import Path

from host.errors import InvalidArgumentError, UnsupportedError
from proto.criu.v1 import images_pb2
from runtime.checkpoint.restore import criu_images
from runtime.checkpoint.restore.memory_images import check_memory
from runtime.checkpoint.restore.mount_rights import check_mounts
from runtime.checkpoint.restore.seccomp_rights import check_filters
from runtime.checkpoint.restore.tmpfs_images import DEVICES
from runtime.specgen import config
from runtime.specgen.capabilities import NAMES

_CORE = re.compile(r"core-(\d+)\.img")
_MOUNTS = re.compile(r"mountpoints-\d+\.img")
_NETWORKS = re.compile(r"netns-\d+\.img")
_GHOST = re.compile(r"ghost-file-.*\.img")
# Kinds of open files (fd_types of CRIU's fdinfo.proto) that the container could also open itself.
_REGULAR, _INTERNET = 1, 4
_FILES = {_REGULAR, 2, 3, _INTERNET, 5, 6, 7, 8, 9, 17, 18}
_SOCKETS = {1, 2}  # streams and datagrams; raw sockets need a capability that the processes may not have
_NAMESPACES = {
    "mount": "mnt_ns_id",
    "pid": "pid_ns_id",
    "network": "net_ns_id",
    "ipc": "ipc_ns_id",
    "uts": "uts_ns_id",
    "user": "user_ns_id",
}
_ORDINARY = {0, 3, 5}  # SCHED_NORMAL, SCHED_BATCH, SCHED_IDLE
_GIVEN_NETWORK = "extRootNetNS"  # the name that crun and runc use


def check_rights(folder: Path, spec: config.Spec) -> int:
    """Compare all images in ``folder``, which CRIU wrote, with ``spec``. Returns the number of their cgroup set.

    Raises InvalidArgumentError for a right that the configuration does not have, UnsupportedError for a right that
    cannot be compared.
    """
    if spec.process.selinux_label:
        raise UnsupportedError("a container with an SELinux label cannot be restored")
    threads = {
        int(match[1]): core
        for path in sorted(folder.iterdir())
        if (match := _CORE.fullmatch(path.name))
        for core in criu_images.entries(path, images_pb2.Core)
    }
    cores = list(threads.values())
    if not cores:
        raise InvalidArgumentError("the checkpoint has no processes")
    for core in cores:
        _check_thread(core, spec.process)
    if spec.linux.seccomp is not None:
        check_filters(folder, threads, spec)
    _check_namespaces(folder, cores, spec)
    _check_files(criu_images.entries(folder / "files.img", images_pb2.File))
    mounts = [
        mount
        for path in sorted(folder.iterdir())
        if _MOUNTS.fullmatch(path.name)
        for mount in criu_images.entries(path, images_pb2.Mount)
    ]
    check_mounts(mounts, spec)
    check_memory(folder)
    for path in sorted(folder.iterdir()):
        if _GHOST.fullmatch(path.name):
            _check_ghost(path)
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
        raise InvalidArgumentError(f"a process of the checkpoint does not have the configuration's user {user}")
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
    if core.tc.HasField("old_seccomp_mode") or core.tc.HasField("old_seccomp_filter"):
        raise InvalidArgumentError("a process of the checkpoint has its seccomp filter in two places")  # CRIU uses one
    _check_groups(credentials, process)
    thread = core.thread_core
    urgent = thread.sched_nice < 0 or thread.sched_policy not in _ORDINARY
    if urgent and "CAP_SYS_NICE" not in bounding:
        raise InvalidArgumentError("a process of the checkpoint has a priority that needs CAP_SYS_NICE")
    if process.no_new_privileges and not credentials.no_new_privs:
        raise InvalidArgumentError("a process of the checkpoint may gain privileges, which the configuration forbids")
    if process.apparmor_profile and credentials.lsm_profile != process.apparmor_profile:
        raise InvalidArgumentError(
            f"a process of the checkpoint is not under the AppArmor profile {process.apparmor_profile!r}"
        )


def _check_groups(credentials: images_pb2.Credentials, process: config.Process) -> None:
    """Check the groups: only root, or a process that may choose its groups, can have others than the configuration."""
    user, given = process.user, process.capabilities or config.Capabilities()
    if user.uid == 0 or "CAP_SETGID" in given.permitted:
        return
    groups = {credentials.gid, credentials.egid, credentials.sgid, credentials.fsgid, *credentials.groups}
    more = groups - {user.gid, *user.additional_gids}
    if more:
        raise InvalidArgumentError(
            f"a process of the checkpoint has groups that the configuration does not give: {sorted(more)[:20]}"
        )


def _names(words: Iterable[int]) -> set[str]:
    bits = sum(word << 32 * index for index, word in enumerate(words))
    known = {name for number, name in enumerate(NAMES) if bits >> number & 1}
    return known | ({"unknown ones"} if bits >> len(NAMES) else set())


def _check_namespaces(folder: Path, cores: Iterable[images_pb2.Core], spec: config.Spec) -> None:
    """Check that all processes are in the container's namespaces, and in none of those that CRIU runs in."""
    (inventory,) = _single(folder / "inventory.img", images_pb2.Inventory)
    outside = inventory.root_ids
    found = [core.ids for core in cores if core.HasField("ids")]
    for path in folder.glob("ids-*.img"):
        found += criu_images.entries(path, images_pb2.Namespaces)
    if not found:
        raise InvalidArgumentError("the checkpoint does not have the namespaces of its processes")
    if any(path for path in folder.glob("userns-*.img")):
        raise UnsupportedError("the checkpoint has a user namespace, which is not restored")
    own = {namespace.type for namespace in spec.linux.namespaces} | {"mount"}
    if "network" in own:
        _check_network(folder)
    for ids in found:
        for kind, member in _NAMESPACES.items():
            number = getattr(ids, member)
            if number != getattr(found[0], member):
                raise UnsupportedError(f"processes of the checkpoint have other {kind} namespaces than their container")
            if (number != getattr(outside, member)) != (kind in own) or not ids.HasField(member):
                raise InvalidArgumentError(f"the {kind} namespace of the checkpoint is not that of the configuration")


def _check_network(folder: Path) -> None:
    """Check that the network namespace is the pod's: CRIU would make a new one, without the node's rules."""
    for path in folder.iterdir():
        if _NETWORKS.fullmatch(path.name):
            found = list(criu_images.entries(path, images_pb2.NetworkNamespace))
            if [entry.ext_key for entry in found] != [_GIVEN_NETWORK]:
                raise InvalidArgumentError("the network namespace of the checkpoint is not that of a pod")


def _check_ghost(path: Path) -> None:
    """Check an open file without a name: CRIU would create a file of any kind."""
    first = next(criu_images.entries(path, images_pb2.GhostFile), None)
    if first is None or stat.S_ISCHR(first.mode) or stat.S_ISBLK(first.mode) or not first.mode:
        raise InvalidArgumentError(f"the checkpoint's {path.name} is not a file that a container could have had open")


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
            raise InvalidArgumentError("the checkpoint does not have the kind of a file that a process has open")
        device = stat.S_ISCHR(mode) and name.startswith("/dev/") and name[5:] in DEVICES
        if (stat.S_ISBLK(mode) or stat.S_ISCHR(mode)) and not device:
            raise InvalidArgumentError(f"a process of the checkpoint has the device {name[:100]!r} open")
