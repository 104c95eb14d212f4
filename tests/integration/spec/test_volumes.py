"""What an image has at a VOLUME is copied with owners, modes and links, and never from outside the image."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

import pytest

from host.concurrency.abandonable import AbandonableThreads, Permission
from host.errors import LimitError
from runtime.specgen.mounts.image_volumes import Volume, make_volumes
from runtime.specgen.mounts.volume_content import CopyLimits
from tests.support.agent import wait_for

LIMITS = CopyLimits(1 << 20, 1000)


def test_content_is_copied_as_it_is(tmp_path: Path) -> None:
    source = tmp_path / "rootfs/data"
    (source / "sub").mkdir(parents=True)
    (source / "sub/file").write_text("content")
    os.chown(source / "sub/file", 7, 8)
    (source / "sub/file").chmod(0o4750)
    os.setxattr(source / "sub/file", "user.kept", b"yes")
    (source / "link").symlink_to("/etc/shadow")
    os.mkfifo(source / "pipe", 0o600)
    os.mknod(source / "device", 0o020600, os.makedev(1, 3))
    os.mknod(source / "socket", 0o140600)
    (source / "again").hardlink_to(source / "sub/file")
    os.utime(source / "sub", ns=(1, 2))
    source.chmod(0o1777)
    os.chown(source, 5, 6)
    volume = Volume(tmp_path / "container/volumes/a", "/data")
    make_volumes([volume], tmp_path / "rootfs", limits=LIMITS)
    made = volume.folder
    assert (stat.S_IMODE(made.stat().st_mode), made.stat().st_uid, made.stat().st_gid) == (0o1777, 5, 6)
    status = (made / "sub/file").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o4750, 7, 8)
    assert os.getxattr(made / "sub/file", "user.kept") == b"yes"
    assert (made / "sub/file").read_text() == "content"
    assert str((made / "link").readlink()) == "/etc/shadow"
    assert stat.S_ISFIFO((made / "pipe").stat().st_mode)
    assert (stat.S_ISCHR((made / "device").stat().st_mode), (made / "device").stat().st_rdev) == (
        True,
        os.makedev(1, 3),
    )
    assert stat.S_IMODE((made / "device").stat().st_mode) == 0o600
    assert stat.S_ISSOCK((made / "socket").stat().st_mode)
    assert (made / "again").stat().st_ino == (made / "sub/file").stat().st_ino
    for name in ("sub", "sub/file", "link", "pipe", "device"):
        assert (made / name).lstat().st_mtime_ns == (source / name).lstat().st_mtime_ns


def test_links_out_of_the_image_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "rootfs").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").touch()
    (tmp_path / "rootfs/data").symlink_to(tmp_path / "outside")
    (tmp_path / "rootfs/file").touch()
    volumes = [Volume(tmp_path / "a", "/data"), Volume(tmp_path / "b", "/file"), Volume(tmp_path / "c", "/file/below")]
    make_volumes(volumes, tmp_path / "rootfs", limits=LIMITS)
    for volume in volumes:
        assert list(volume.folder.iterdir()) == []


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_holes_are_copied_as_holes_and_count_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "rootfs/data").mkdir(parents=True)
    with (tmp_path / "rootfs/data/sparse").open("wb") as sparse:
        for offset in (0, 5 << 20, 2 << 30):
            sparse.seek(offset)
            sparse.write(b"%d" % offset)
        sparse.truncate(4 << 30)
    (tmp_path / "rootfs/data/nothing").touch()
    os.truncate(tmp_path / "rootfs/data/nothing", 1 << 40)
    make_volumes([Volume(tmp_path / "v", "/data")], tmp_path / "rootfs", limits=LIMITS)
    copy = tmp_path / "v/sparse"
    assert copy.stat().st_size == 4 << 30
    assert allocated(copy) == allocated(tmp_path / "rootfs/data/sparse") < 1 << 20
    assert ((tmp_path / "v/nothing").stat().st_size, allocated(tmp_path / "v/nothing")) == (1 << 40, 0)
    with copy.open("rb") as file:
        for offset in (0, 5 << 20, 2 << 30):
            file.seek(offset)
            assert file.read(12).rstrip(b"\0") == b"%d" % offset


@pytest.mark.parametrize(("limits", "option"), [(CopyLimits(1000, 10), "bytes"), (CopyLimits(10_000, 2), "entries")])
def test_more_than_the_limits_is_refused(tmp_path: Path, limits: CopyLimits, option: str) -> None:
    for name in ("one", "two"):
        (tmp_path / "rootfs" / name).mkdir(parents=True)
        (tmp_path / "rootfs" / name / "file").write_bytes(bytes(600))
        (tmp_path / "rootfs" / name / "small").touch()
    volumes = [Volume(tmp_path / "a", "/one"), Volume(tmp_path / "b", "/two")]
    with pytest.raises(LimitError, match=f"VOLUME /two of the image: .*runtime.max_volume_copy_{option}"):
        make_volumes(volumes, tmp_path / "rootfs", limits=limits)


def test_trees_of_any_depth_and_any_names_are_copied(tmp_path: Path) -> None:
    root = tmp_path / "rootfs/data"
    root.mkdir(parents=True)
    folder = os.open(root, os.O_RDONLY)
    name = b"\xff" * 200
    for _ in range(100):
        os.mkdir(name, dir_fd=folder)
        below = os.open(name, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    os.close(os.open(b"file", os.O_CREAT, dir_fd=folder))
    os.close(folder)
    make_volumes([Volume(tmp_path / "v", "/data")], tmp_path / "rootfs", limits=LIMITS)
    folder = os.open(tmp_path / "v", os.O_RDONLY)
    for _ in range(100):
        below = os.open(name, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    assert os.stat(b"file", dir_fd=folder).st_size == 0
    os.close(folder)


async def test_a_cancelled_call_ends_the_copying(tmp_path: Path) -> None:
    (tmp_path / "rootfs/data").mkdir(parents=True)
    for number in range(500):
        (tmp_path / "rootfs/data" / str(number)).touch()
    copies = [Volume(tmp_path / str(number), "/data") for number in range(1000)]
    ended = []

    def work(permission: Permission) -> None:
        try:
            with permission.step():
                limits = CopyLimits(1 << 30, 10_000_000)
                make_volumes(copies, tmp_path / "rootfs", limits=limits, check=permission.check)
        finally:
            ended.append(len(list(tmp_path.iterdir())))

    task = asyncio.create_task(AbandonableThreads(1).run("test", work))
    await asyncio.to_thread(wait_for, (tmp_path / "3").exists)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(ended) == 1  # the call waited for the end of what writes
    assert ended[0] < 900
