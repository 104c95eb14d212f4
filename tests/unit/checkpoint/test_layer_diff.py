"""What a writable layer changed of its image: the tar file, and the names that are gone."""

from __future__ import annotations

import os
import socket
import tarfile
from pathlib import Path

import pytest

from host.errors import PodkeelError, UnsupportedError
from runtime.checkpoint.documents import deleted_files
from runtime.checkpoint.layer_diff import write_diff

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="whiteouts are device nodes, which only root can make")


def whiteout(path: Path) -> None:
    os.mknod(path, 0o020000, os.makedev(0, 0))


def opaque(path: Path) -> None:
    path.mkdir(exist_ok=True)
    try:
        os.setxattr(path, "trusted.overlay.opaque", b"y")
    except OSError:
        pytest.skip("this file system has no trusted extended attributes")


def diff(upper: Path, *lower: Path) -> tuple[dict[str, tarfile.TarInfo], list[str]]:
    target = upper.parent / "diff.tar"
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        removed = write_diff(upper, lower, descriptor, lambda: None)
    finally:
        os.close(descriptor)
    with tarfile.open(target) as archive:
        return {member.name: member for member in archive}, removed


def test_names_of_all_kinds_are_kept(tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    upper.mkdir(mode=0o750)
    odd = os.fsdecode(b"odd \xff\n name")
    (upper / odd).write_text("x")
    (upper / "link").symlink_to("/etc/../" + "y" * 300)
    deep = upper / "/".join(["d" * 200] * 10)
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(b"1" * 5000)
    os.mkfifo(upper / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(upper / "socket"))
    found, removed = diff(upper)
    assert removed == []
    assert found[odd].size == 1
    assert found["link"].linkname == "/etc/../" + "y" * 300
    assert found["/".join(["d" * 200] * 10) + "/file"].size == 5000
    assert found["fifo"].isfifo()
    assert "socket" not in found
    assert found["."].mode == 0o750


@needs_root
def test_whiteouts_are_removed_names(tmp_path: Path) -> None:
    upper, lower = tmp_path / "upper", tmp_path / "lower"
    (upper / "etc").mkdir(parents=True)
    lower.mkdir()
    whiteout(upper / "etc/passwd")
    found, removed = diff(upper, lower)
    assert removed == ["etc/passwd"]
    assert set(found) == {".", "etc"}


@needs_root
def test_a_folder_that_was_made_again_hides_what_the_layers_have_there(tmp_path: Path) -> None:
    upper, top, middle, bottom = (tmp_path / name for name in ("upper", "top", "middle", "bottom"))
    upper.mkdir()
    opaque(upper / "home")
    (upper / "home/kept").write_text("new")
    for layer, names in ((top, ["a"]), (middle, ["b", "kept"]), (bottom, ["c", "gone"])):
        (layer / "home").mkdir(parents=True)
        for name in names:
            (layer / "home" / name).write_text("")
    whiteout(top / "home/gone")
    found, removed = diff(upper, top, middle, bottom)
    assert sorted(removed) == ["home/a", "home/b", "home/c"]
    assert found["home/kept"].size == 3
    opaque(middle / "home")
    assert sorted(diff(upper, top, middle, bottom)[1]) == ["home/a", "home/b"]
    (top / "home/a").unlink()
    (top / "home/gone").unlink()
    (top / "home").rmdir()
    whiteout(top / "home")
    assert diff(upper, top, middle, bottom)[1] == []


def test_a_copy_that_is_given_up_ends(tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    upper.mkdir()
    for number in range(10):
        (upper / str(number)).write_text("x")
    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) > 3:
            raise PodkeelError("given up")

    descriptor = os.open(tmp_path / "diff.tar", os.O_WRONLY | os.O_CREAT)
    try:
        with pytest.raises(PodkeelError, match="given up"):
            write_diff(upper, [], descriptor, check)
    finally:
        os.close(descriptor)


def test_a_removed_name_that_json_cannot_hold_is_refused() -> None:
    assert deleted_files(["a", "ü"]) == b'[\n  "a",\n  "\xc3\xbc"\n]'
    with pytest.raises(UnsupportedError, match="not UTF-8"):
        deleted_files([os.fsdecode(b"\xff")])
