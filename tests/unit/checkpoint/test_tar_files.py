"""Small tar files of a checkpoint, unpacked in the agent: what is taken, and what is left to the unpack worker."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.checkpoint.restore.tar_files import unpack_small


def member(name: str, kind: bytes = tarfile.REGTYPE, *, link: str = "", mode: int = 0o644) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.mode, made.mtime = kind, link, mode, 1_000_000
    return made


def written(folder: Path, *members: tarfile.TarInfo, content: bytes = b"it") -> Path:
    path = folder / "some.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for each in members:
            each.size = len(content) if each.isreg() else 0
            archive.addfile(each, io.BytesIO(content))
    return path


ROOT = member("./", tarfile.DIRTYPE, mode=0o711)


def test_folders_files_and_links_are_made(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    below = member("a/b", mode=0o4755)
    below.uid, below.gid = os.getuid(), os.getgid()
    archive = written(tmp_path, ROOT, member("a", tarfile.DIRTYPE, mode=0o500), below, member("l", b"2", link="/etc"))
    assert unpack_small(archive, target)
    assert (target / "a" / "b").read_bytes() == b"it"
    assert stat.S_IMODE((target / "a" / "b").stat().st_mode) == 0o4755
    assert (target / "l").readlink() == Path("/etc")
    assert [stat.S_IMODE(path.stat().st_mode) for path in (target, target / "a")] == [0o711, 0o500]
    assert {path.lstat().st_mtime for path in (target, target / "a", target / "a" / "b", target / "l")} == {1_000_000}


@pytest.mark.parametrize(
    "members",
    [
        [member("l", tarfile.SYMTYPE, link="/tmp"), member("l/it")],
        [member("../it")],
        [member("a", tarfile.DIRTYPE), member("a/../../it")],
        [member("/it")],
        [member("no/parent")],
        [member("a", tarfile.DIRTYPE), member("a/.", tarfile.DIRTYPE)],
        [member("a//b")],
        [member(".wh.passwd")],
        [member(".")],
        [member("it"), member("it")],
        [member("null", tarfile.CHRTYPE)],
        [member("pipe", tarfile.FIFOTYPE)],
        [member("it"), member("again", tarfile.LNKTYPE, link="it")],
        [member(f"it{number}") for number in range(201)],
    ],
    ids=lambda members: ",".join(each.name for each in members[:2]),
)
def test_anything_odd_is_left_to_the_worker_before_a_file_is_made(
    members: list[tarfile.TarInfo], tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    assert not unpack_small(written(tmp_path, ROOT, *members), target)
    assert list(target.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"target", "some.tar"}


def large(archive: Path) -> None:
    os.truncate(archive, 300 << 10)


def cut_off(archive: Path) -> None:
    os.truncate(archive, 3 * tarfile.BLOCKSIZE + 100)


def garbage(archive: Path) -> None:
    archive.write_bytes(os.urandom(tarfile.BLOCKSIZE))


@pytest.mark.parametrize("change", [large, cut_off, garbage])
def test_what_is_too_large_or_broken_is_left_to_the_worker(change: Callable[[Path], None], tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    archive = written(tmp_path, ROOT, member("it"), content=b"x" * 2000)
    change(archive)
    assert not unpack_small(archive, target)


def test_extended_attributes_and_owners_that_no_file_has_are_left_to_the_worker(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    labelled, foreign = member("it"), member("it")
    labelled.pax_headers = {"SCHILY.xattr.user.x": "y"}
    foreign.uid = (1 << 32) - 1
    assert not unpack_small(written(tmp_path, labelled), target)
    assert not unpack_small(written(tmp_path, foreign), target)


def test_a_link_that_is_in_the_folder_already_is_not_followed(tmp_path: Path) -> None:
    target, outside = tmp_path / "target", tmp_path / "outside"
    target.mkdir()
    outside.mkdir()
    (target / "a").symlink_to(outside)
    (target / "it").symlink_to(outside / "it")
    assert not unpack_small(written(tmp_path, ROOT, member("a", tarfile.DIRTYPE), member("a/b")), target)
    assert not unpack_small(written(tmp_path, ROOT, member("it")), target)
    assert list(outside.iterdir()) == []
