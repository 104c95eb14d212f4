"""What of CRIU's images is written again before a restore, and what of them is left out."""

from __future__ import annotations

import gzip
import io
import os
import resource
import tarfile
from pathlib import Path

import pytest
from google.protobuf.message import Message

from host.errors import InvalidArgumentError
from proto.criu.v1 import images_pb2 as criu
from runtime.checkpoint.restore import criu_images, process_images, source, tmpfs_images, volume_files
from runtime.specgen import config

NO_LIMIT = (1 << 64) - 1
NAME = "tmpfs-dev-79.tar.gz.img"


def packed(*members: tarfile.TarInfo | tuple[str, bytes], end: bytes = bytes(1024)) -> bytes:
    plain = io.BytesIO()
    for member in members:
        if isinstance(member, tuple):
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            plain.write(info.tobuf() + member[1] + bytes(-info.size % 512))
        else:
            plain.write(member.tobuf())
    return gzip.compress(plain.getvalue() + end)


def node(kind: bytes, major: int = 0, minor: int = 0, name: str = "./node", link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.devmajor, member.devminor, member.linkname = kind, major, minor, link
    return member


def again(folder: Path, content: bytes) -> dict[str, tarfile.TarInfo]:
    (folder / "old").mkdir(exist_ok=True)
    (folder / "old" / NAME).write_bytes(content)
    (folder / NAME).unlink(missing_ok=True)
    tmpfs_images.write_again(folder / "old" / NAME, folder / NAME)
    with tarfile.open(folder / NAME) as archive:
        return {member.name: member for member in archive}


def test_a_file_system_in_memory_is_written_again(tmp_path: Path) -> None:
    null = node(tarfile.CHRTYPE, 1, 3, "./null")
    null.uid, null.mode, null.mtime = 7, 0o640, 1_700_000_000
    content = packed(node(tarfile.DIRTYPE, name="./"), null, ("./file", b"it"), node(tarfile.FIFOTYPE, name="./fifo"))
    found = again(tmp_path, content)
    assert sorted(found) == [".", "./fifo", "./file", "./null"]
    assert (found["./null"].uid, found["./null"].mode, found["./null"].mtime) == (7, 0o640, 1_700_000_000)
    with tarfile.open(tmp_path / NAME) as archive:
        assert archive.extractfile("./file").read() == b"it"  # type: ignore[union-attr]  # it is a file


DISK = node(tarfile.BLKTYPE, 8, 0, "./disk")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (packed(DISK), "8:0"),
        (packed(node(tarfile.CHRTYPE, 1, 1, "null")), "1:1"),
        (packed(("../../etc/x", b"")), "leaves the file system"),
        (packed(("/etc/x", b"")), "leaves the file system"),
        (packed(node(tarfile.LNKTYPE, link="../../etc/shadow")), "leaves the file system"),
        (packed(node(tarfile.SYMTYPE, name="./a", link="/etc"), ("./a/passwd", b"")), "leaves the file system"),
        (packed(end=b"") + packed(DISK), "8:0"),  # in a second stream, which gunzip reads too
        (packed(("f", b"x"))[:-20], "broken"),
        (b"no gzip", "broken"),
    ],
)
def test_odd_files_of_a_tmpfs_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        again(tmp_path, content)


def test_what_follows_the_end_is_not_written(tmp_path: Path) -> None:
    hidden = packed(("f", b"x"), end=bytes(512)) + packed(DISK)  # GNU tar passes over a single block of zeros
    assert list(again(tmp_path, hidden)) == ["f"]


def write(path: Path, *messages: Message) -> None:
    criu_images.write(path, b"magicmag", *messages)


def processes(folder: Path, *adjustments: int) -> Path:
    layer = folder / "layer"
    layer.mkdir()
    write(layer / "pstree.img", *(criu.Process(pid=number) for number in range(1, len(adjustments) + 1)))
    for number, adjustment in enumerate(adjustments, 1):
        core = criu.Core(mtype=1)
        core.tc.oom_score_adj, core.tc.loginuid, core.tc.comm = adjustment, 0, "it"
        for _ in range(16):
            core.tc.rlimits.rlimits.add(cur=NO_LIMIT, max=NO_LIMIT)
        core.tc.rlimits.rlimits[resource.RLIMIT_NOFILE].cur = 100
        write(layer / f"core-{number}.img", core)
    (folder / "target").mkdir()
    return layer


def cores(folder: Path) -> list[criu.Core]:
    return [next(criu_images.entries(path, criu.Core)) for path in sorted((folder / "target").glob("core-*"))]


def test_limits_are_at_most_those_of_the_configuration(tmp_path: Path) -> None:
    process = config.Process(cwd="/", user=config.User(uid=0, gid=0), args=["it"], oom_score_adj=500)
    process.rlimits = [
        config.Rlimit(type="RLIMIT_NOFILE", soft=1000, hard=2000),
        config.Rlimit(type="RLIMIT_NPROC", soft=10, hard=20),
    ]
    process_images.write_again(processes(tmp_path, -1000, -1000, -999, 700), tmp_path / "target", process)
    found = cores(tmp_path)
    assert [core.tc.oom_score_adj for core in found] == [500, 500, 500, 700]
    assert not any(core.tc.HasField("loginuid") for core in found)
    assert all(core.tc.comm == "it" for core in found)
    limits = found[0].tc.rlimits.rlimits
    assert (limits[resource.RLIMIT_NOFILE].cur, limits[resource.RLIMIT_NOFILE].max) == (100, 2000)
    assert (limits[resource.RLIMIT_NPROC].cur, limits[resource.RLIMIT_NPROC].max) == (10, 20)
    own = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1] & NO_LIMIT
    assert limits[resource.RLIMIT_MEMLOCK].max == own
    assert len(limits) == 16


def test_a_checkpoint_without_limits_gets_them(tmp_path: Path) -> None:
    layer = processes(tmp_path, 0)
    core = next(criu_images.entries(layer / "core-1.img", criu.Core))
    core.tc.ClearField("rlimits")
    write(layer / "core-1.img", core)
    process = config.Process(cwd="/", user=config.User(uid=0, gid=0), args=["it"])
    process.rlimits = [config.Rlimit(type="RLIMIT_NOFILE", soft=1000, hard=2000)]
    process_images.write_again(layer, tmp_path / "target", process)
    limits = cores(tmp_path)[0].tc.rlimits.rlimits
    assert (limits[resource.RLIMIT_NOFILE].cur, limits[resource.RLIMIT_NOFILE].max) == (1000, 2000)


@pytest.mark.parametrize("missing", ["pstree.img", "core-1.img"])
def test_the_first_process_must_be_there(tmp_path: Path, missing: str) -> None:
    layer = processes(tmp_path, 0, 0)
    (layer / missing).unlink()
    process = config.Process(cwd="/", user=config.User(uid=0, gid=0), args=["it"])
    with pytest.raises(InvalidArgumentError):
        process_images.write_again(layer, tmp_path / "target", process)


def test_images_that_are_orders_to_criu_are_left_out(tmp_path: Path) -> None:
    images = tmp_path / "checkpoint"
    images.mkdir()
    kept = ("mm-1.img", "pages-1.img", "pagemap-1.img", "fdinfo-2.img", "files.img", "mountpoints-13.img", "pstree.img")
    orders = (
        "apparmor.img", "netdev-10.img", "ifaddr-10.img", "route-10.img", "iptables-10.img", "nftables-10.img",
        "binfmt-misc-1.img", "rlimit-1.img", "creds-1.img", "core-1.img", "cgroup.img", "tmpfs-dev-1.tar.gz.img",
        "inventory.img", "descriptors.json", "criu.conf", "netns-ct-10.img",
    )  # fmt: skip
    for name in (*kept, *orders):
        (images / name).write_bytes(b"it")
    source.link_images(tmp_path, tmp_path / "target")
    assert sorted(path.name for path in (tmp_path / "target").iterdir()) == sorted(kept)


def test_files_of_volumes_that_are_written_to_may_have_grown(tmp_path: Path) -> None:
    layer, target = tmp_path / "layer", tmp_path / "target"
    layer.mkdir()
    target.mkdir()
    mounts = [
        criu.Mount(mnt_id=1, mountpoint="./", ext_key="/"),
        criu.Mount(mnt_id=2, mountpoint="./data", ext_key="/d"),
    ]
    criu_images.write(layer / "mountpoints-13.img", b"m" * 8, *mounts, criu.Mount(mnt_id=3, mountpoint="./dev"))
    files = [
        criu.File(type=1, id=number, reg=criu.RegularFile(id=number, flags=flags, name="x", mnt_id=mount, size=7))
        for number, (flags, mount) in enumerate(
            [(os.O_RDWR, 2), (os.O_WRONLY | os.O_APPEND, 2), (os.O_RDONLY, 2), (os.O_RDWR, 1), (os.O_RDWR, 3)]
        )
    ]
    criu_images.write(layer / "files.img", b"f" * 8, *files)
    before = (layer / "files.img").read_bytes()
    os.link(layer / "files.img", target / "files.img")
    volume_files.forget_sizes(layer, target)
    found = list(criu_images.entries(target / "files.img", criu.File))
    assert [each.reg.HasField("size") for each in found] == [False, False, True, True, True]
    assert [each.id for each in found] == [0, 1, 2, 3, 4]
    assert (target / "files.img").read_bytes()[:8] == b"f" * 8
    assert (layer / "files.img").read_bytes() == before
