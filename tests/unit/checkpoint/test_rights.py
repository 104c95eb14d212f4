"""A checkpoint gives its processes no right that the configuration of the restored container does not give."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from google.protobuf.message import Message

from host.errors import InvalidArgumentError, PodkeelError, UnsupportedError
from proto.criu.v1 import images_pb2 as criu
from runtime.checkpoint.restore.rights import check_rights
from runtime.specgen import config

CAPABILITIES = ["CAP_CHOWN", "CAP_KILL"]  # bits 0 and 5


def spec() -> config.Spec:
    capabilities = config.Capabilities(bounding=CAPABILITIES, effective=CAPABILITIES, permitted=CAPABILITIES)
    kinds = ("mount", "pid", "network", "ipc", "uts")
    return config.Spec(
        oci_version="1.0.2",
        process=config.Process(cwd="/", user=config.User(uid=0, gid=0), args=["it"], capabilities=capabilities),
        root=config.Root(path="rootfs"),
        mounts=[
            config.Mount(destination="/proc", type="proc", options=["nosuid"]),
            config.Mount(destination="/dev", type="tmpfs", options=["nosuid"]),
            config.Mount(destination="/sys", type="sysfs", options=["ro", "nosuid"]),
            config.Mount(destination="/data", type="bind", source="/somewhere", options=["rbind", "ro"]),
            config.Mount(destination="/cgroup", type="cgroup", source="cgroup", options=["nosuid", "ro"]),
        ],
        linux=config.Linux(namespaces=[config.Namespace(type=kind) for kind in kinds]),
    )


class Images:
    """CRIU's images of one process, which ``spec`` gives all it has."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        inside = criu.Namespaces(pid_ns_id=11, net_ns_id=12, ipc_ns_id=13, uts_ns_id=14, mnt_ns_id=15, user_ns_id=6)
        self.ids = inside
        self.inventory = criu.Inventory(img_version=2, root_cg_set=1)
        outside = criu.Namespaces(pid_ns_id=1, net_ns_id=2, ipc_ns_id=3, uts_ns_id=4, mnt_ns_id=5, user_ns_id=6)
        self.inventory.root_ids.CopyFrom(outside)
        self.core = criu.Core(mtype=1)
        self.core.thread_core.cg_set = 2
        credentials = self.core.thread_core.creds
        for field in (credentials.cap_prm, credentials.cap_eff, credentials.cap_bnd):
            field.extend([1 | 1 << 5, 0])
        credentials.uid = credentials.euid = credentials.suid = credentials.fsuid = 0
        self.files = [criu.File(type=1, id=1), criu.File(type=2, id=2)]
        self.files[0].reg.name, self.files[0].reg.mode = "/dev/null", 0o020666
        self.mounts = [
            criu.Mount(fstype=17, mountpoint="/", flags=0),
            criu.Mount(fstype=1, mountpoint="/proc", flags=2),
            criu.Mount(fstype=5, mountpoint="/dev", flags=2),
            criu.Mount(fstype=2, mountpoint="/sys", flags=3),
            criu.Mount(fstype=16, mountpoint="/data", flags=1, ext_key="/data"),
            criu.Mount(fstype=5, mountpoint="/cgroup", flags=2),
            criu.Mount(fstype=12, mountpoint="/cgroup/pids", flags=3, ext_key="/cgroup/pids"),
        ]
        self.filters: list[bytes] = []
        self.flags = 0
        self.threads: dict[int, criu.Core] = {}
        self.network = criu.NetworkNamespace(ext_key="extRootNetNS")
        self.ghost = criu.GhostFile(mode=0o100644)

    def write(self) -> Path:
        self._write("core-1.img", self.core)
        self._write("pstree.img", criu.Process(pid=1, threads=[1, *self.threads]))
        for number, thread in self.threads.items():
            self._write(f"core-{number}.img", thread)
        self._write("ids-1.img", self.ids)
        self._write("files.img", *self.files)
        self._write("mountpoints-9.img", *self.mounts)
        self._write("netns-12.img", self.network)
        self._write("ghost-file-1.img", self.ghost)
        self._write("inventory.img", self.inventory, magic=4)
        self._write(
            "seccomp.img",
            criu.Seccomp(seccomp_filters=[criu.SeccompFilter(filter=it, flags=self.flags) for it in self.filters]),
        )
        return self.folder

    def _write(self, name: str, *messages: Message, magic: int = 8) -> None:
        encoded = [message.SerializeToString() for message in messages]
        content = b"".join(struct.pack("<I", len(entry)) + entry for entry in encoded)
        (self.folder / name).write_bytes(b"m" * magic + content)


def test_what_the_configuration_gives_is_restored(tmp_path: Path) -> None:
    images = Images(tmp_path)
    assert check_rights(images.write(), spec()) == 2


def _set(path: str, value: object) -> Callable[[Images], None]:
    """A change of one member of the images."""

    def change(images: Images) -> None:
        *parents, last = path.split(".")
        target: Any = images
        for name in parents:
            target = target[int(name)] if name.isdigit() else getattr(target, name)
        if isinstance(value, list):
            del getattr(target, last)[:]
            getattr(target, last).extend(value)
        else:
            setattr(target, last, value)

    return change


def _add(member: str, item: Message) -> Callable[[Images], None]:
    return lambda images: getattr(images, member).append(item)


HOSTILE: dict[str, tuple[Callable[[Images], None], str]] = {
    "capability": (_set("core.thread_core.creds.cap_eff", [1 << 21, 0]), "CAP_SYS_ADMIN"),
    "bounding": (_set("core.thread_core.creds.cap_bnd", [1 << 21, 0]), "CAP_SYS_ADMIN"),
    "unknown capability": (_set("core.thread_core.creds.cap_prm", [0, 1 << 31]), "unknown ones"),
    "third word": (_set("core.thread_core.creds.cap_inh", [0, 0, 1]), "unknown ones"),
    "mount namespace": (_set("ids.mnt_ns_id", 5), "mount namespace"),
    "network namespace": (_set("ids.net_ns_id", 2), "network namespace"),
    "pid namespace": (_set("ids.pid_ns_id", 1), "pid namespace"),
    "ipc namespace": (_set("ids.ipc_ns_id", 3), "ipc namespace"),
    "user namespace": (_set("ids.user_ns_id", 7), "user namespace"),
    "no credentials": (lambda images: images.core.thread_core.ClearField("creds"), "no credentials"),
    "block device": (_set("files.0.reg.mode", 0o060660), "device"),
    "memory": (_set("files.0.reg.name", "/dev/mem"), "device"),
    "link to memory": (_set("files.0.reg.name", "/dev/../mem"), "device"),
    "no kind of file": (_set("files.0.reg.mode", 0), "the kind of a file"),
    "namespace file": (_add("files", criu.File(type=14, id=9)), "not restored"),
    "raw socket": (_add("files", criu.File(type=4, id=9, isk=criu.InternetSocket(type=3))), "raw socket"),
    "another mount": (_add("mounts", criu.Mount(fstype=11, mountpoint="/debug")), "/debug"),
    "another proc": (_add("mounts", criu.Mount(fstype=1, mountpoint="/p")), "/p"),
    "block file system": (_add("mounts", criu.Mount(fstype=16, mountpoint="/disk", source="/dev/sda")), "/disk"),
    "writable sys": (_set("mounts.3.flags", 2), "'ro'"),
    "mount of the node's elsewhere": (_set("mounts.4.mountpoint", "/etc"), "belongs elsewhere"),
    "missing mount": (lambda images: images.mounts.__delitem__(4), "/data"),
    "plugin": (_set("mounts.1.with_plugin", True), "plugin"),
    "second root": (_add("mounts", criu.Mount(fstype=16, mountpoint="/", source="/dev/sda", fsname="ext4")), "several"),
    "second proc": (_add("mounts", criu.Mount(fstype=1, mountpoint="/proc", flags=2)), "several mounts at /proc"),
    "whole hierarchy": (_add("mounts", criu.Mount(fstype=12, mountpoint="/cgroup/memory", flags=1)), "/cgroup/memory"),
    "writable hierarchy": (
        _add("mounts", criu.Mount(fstype=12, mountpoint="/cgroup/cpu", flags=2, ext_key="/cgroup/cpu")),
        "does not have 'ro'",
    ),
    "writable volume": (_set("mounts.4.flags", 0), "the mount at /data does not have 'ro'"),
    "shared with the node": (_set("mounts.4.shared_id", 7), "shared with the node"),
    "follows the node": (_set("mounts.1.master_id", 7), "shared with the node"),
    "own network": (lambda images: images.network.ClearField("ext_key"), "network namespace"),
    "network of others": (_set("network.ext_key", "other"), "network namespace"),
    "unnamed device": (_set("ghost.mode", 0o060666), "ghost-file-1.img"),
    "unnamed memory": (_set("ghost.mode", 0o020666), "ghost-file-1.img"),
    "old filter": (_set("core.tc.old_seccomp_mode", 0), "two places"),
    "old filter's number": (_set("core.tc.old_seccomp_filter", 1), "two places"),
    "realtime": (_set("core.thread_core.sched_policy", 1), "CAP_SYS_NICE"),
    "nice": (_set("core.thread_core.sched_nice", -20), "CAP_SYS_NICE"),
}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_what_it_does_not_give_is_refused(tmp_path: Path, hostile: str) -> None:
    change, words = HOSTILE[hostile]
    images = Images(tmp_path)
    change(images)
    with pytest.raises(PodkeelError, match=words):
        check_rights(images.write(), spec())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda it: setattr(it.process, "no_new_privileges", True), "may gain privileges"),
        (lambda it: setattr(it.process, "apparmor_profile", "podkeel-default"), "AppArmor"),
        (lambda it: setattr(it.process, "selinux_label", "a:b:c:s0"), "SELinux"),
        (lambda it: setattr(it.process.user, "uid", 1000), "user 1000"),
        (lambda it: setattr(it.process, "capabilities", None), "CAP_CHOWN"),
        (lambda it: setattr(it.root, "readonly", True), "root file system is not read-only"),
        (lambda it: setattr(it.linux, "readonly_paths", ["/proc/sys"]), "/proc/sys is not read-only"),
        (lambda it: setattr(it.linux, "masked_paths", ["/proc/keys", "/proc/version"]), "is not masked"),
        (lambda it: setattr(it.linux, "seccomp", msgspec.Raw(b"{}")), "cannot be compared"),
        (lambda it: it.mounts.append(config.Mount(destination="/more", type="bind")), "/more"),
    ],
)  # fmt: skip
def test_what_the_configuration_forbids(tmp_path: Path, change: Callable[[config.Spec], None], words: str) -> None:
    wanted = spec()
    change(wanted)
    with pytest.raises(PodkeelError, match=words):
        check_rights(Images(tmp_path).write(), wanted)


def test_processes_of_several_cgroups_are_not_restored(tmp_path: Path) -> None:
    images = Images(tmp_path)
    thread = criu.Core()
    thread.CopyFrom(images.core)
    thread.thread_core.cg_set = 3
    images.threads[2] = thread
    with pytest.raises(UnsupportedError, match="its processes were in several cgroups"):
        check_rights(images.write(), spec())


def test_containers_with_an_selinux_label_are_not_restored(tmp_path: Path) -> None:
    wanted = spec()
    wanted.process.selinux_label = "system_u:system_r:container_t:s0:c1,c2"
    with pytest.raises(UnsupportedError, match="a container with an SELinux label"):
        check_rights(Images(tmp_path).write(), wanted)


def test_the_seccomp_profile_must_be_the_same(tmp_path: Path) -> None:
    wanted = spec()
    wanted.linux.seccomp = msgspec.Raw(b"{}")
    wanted.annotations = {"run.oci.seccomp_bpf_data": "Zmlyc3Q="}
    images = Images(tmp_path)
    with pytest.raises(InvalidArgumentError, match="seccomp"):
        check_rights(images.write(), wanted)
    images.core.thread_core.seccomp_mode, images.core.thread_core.seccomp_filter = 2, 0
    images.filters = [b"other"]
    with pytest.raises(InvalidArgumentError, match="seccomp"):
        check_rights(images.write(), wanted)
    images.filters = [b"first"]
    check_rights(images.write(), wanted)


def test_threads_without_a_filter_have_that_of_their_process(tmp_path: Path) -> None:
    wanted = spec()
    wanted.linux.seccomp = msgspec.Raw(b"{}")
    wanted.annotations = {"run.oci.seccomp_bpf_data": "Zmlyc3Q="}
    images = Images(tmp_path)
    images.filters = [b"first"]
    thread = criu.Core()
    thread.CopyFrom(images.core)
    thread.ClearField("ids")
    images.threads = {3: thread}
    images.core.thread_core.seccomp_mode, images.core.thread_core.seccomp_filter = 2, 0
    with pytest.raises(InvalidArgumentError, match="seccomp"):
        check_rights(images.write(), wanted)
    images.flags = 1  # CRIU sets the filter for all threads
    check_rights(images.write(), wanted)
    thread.thread_core.seccomp_mode = 1
    with pytest.raises(InvalidArgumentError, match="seccomp"):
        check_rights(images.write(), wanted)
    thread.thread_core.ClearField("seccomp_mode")
    images.threads = {}
    (tmp_path / "core-3.img").rename(tmp_path / "core-9.img")  # of no process that the checkpoint names
    with pytest.raises(InvalidArgumentError, match="seccomp"):
        check_rights(images.write(), wanted)


def test_a_user_has_the_groups_of_the_configuration(tmp_path: Path) -> None:
    wanted = spec()
    wanted.process.user = config.User(uid=1000, gid=1000, additional_gids=[2000])
    images = Images(tmp_path)
    credentials = images.core.thread_core.creds
    credentials.uid = credentials.euid = credentials.suid = credentials.fsuid = 1000
    credentials.gid = credentials.egid = credentials.sgid = credentials.fsgid = 1000
    credentials.groups.extend([1000, 2000])
    check_rights(images.write(), wanted)
    credentials.groups.append(6)
    with pytest.raises(InvalidArgumentError, match=r"groups that the configuration does not give: \[6\]"):
        check_rights(images.write(), wanted)
    del credentials.groups[:]
    credentials.egid = 0
    with pytest.raises(InvalidArgumentError, match=r"\[0\]"):
        check_rights(images.write(), wanted)
    assert wanted.process.capabilities is not None
    wanted.process.capabilities.permitted = [*CAPABILITIES, "CAP_SETGID"]
    check_rights(images.write(), wanted)


@pytest.mark.parametrize("name", ["core-1.img", "files.img", "mountpoints-9.img", "inventory.img", "ids-1.img"])
def test_broken_images(tmp_path: Path, name: str) -> None:
    folder = Images(tmp_path).write()
    whole = (folder / name).read_bytes()
    for content in (whole[:-1], whole + b"\xff\xff\xff\xff", whole[:8] + b"\x02\0\0\0\xff\xff", whole[:9]):
        (folder / name).write_bytes(content)
        with pytest.raises(PodkeelError):
            check_rights(folder, spec())
