"""Walking and removing trees of any shape: deep, wide, with odd names, links and mounts."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from host.files import mounts
from host.files.file_tree import MAX_OPEN, FolderStack, Walk, shown
from host.files.removal import OutOfBudgetError, Removal, remove_tree

_LONG = "n" * 250


def make_deep(folder: Path, levels: int, name: str = _LONG) -> None:
    """Folders in each other, deeper than any path can say, with a file in the last."""
    current = os.open(folder, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir(name, dir_fd=current)
        below = os.open(name, os.O_RDONLY, dir_fd=current)
        os.close(current)
        current = below
    os.close(os.open("last", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=current))
    os.close(current)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize("levels", [17, MAX_OPEN, MAX_OPEN + 1, 2000])
def test_deep_trees_are_walked_with_few_descriptors_and_removed(tmp_path: Path, root: int, levels: int) -> None:
    (tmp_path / "deep").mkdir()
    make_deep(tmp_path / "deep", levels)
    before = most = open_descriptors()
    entered = left = files = 0
    for step in Walk(root):
        most = max(most, open_descriptors())
        if step.entry is None:
            left += 1
        elif step.entry.is_dir(follow_symlinks=False):
            entered += 1
        else:
            files += 1
            assert step.entry.stat(follow_symlinks=False).st_size == 0
    assert (entered, left, files) == (levels + 1, levels + 1, 1)
    assert most <= before + MAX_OPEN + 5
    assert open_descriptors() == before
    assert remove_tree(tmp_path / "deep") == []
    assert names(tmp_path) == []


def test_names_that_are_not_utf_8_are_walked_and_removed(tmp_path: Path, root: int) -> None:
    folder = os.fsencode(tmp_path) + b"/\xff\xfe\n"
    Path(os.fsdecode(folder)).mkdir()
    Path(os.fsdecode(folder + b"/li\xe9n")).symlink_to(os.fsdecode(b"/etc/\xff"))
    os.mkfifo(folder + b"/\x80")
    assert sorted(os.fsencode(step.name) for step in Walk(root) if step.entry) == sorted(
        [b"\xff\xfe\n", b"li\xe9n", b"\x80"]
    )
    removal = Removal()
    assert removal.remove(root, os.fsdecode(b"\xff\xfe\n"))
    assert (names(tmp_path), removal.messages) == ([], [])
    assert shown(os.fsdecode(b"a\xff\n")) == "a\\xff\\n"


def test_a_folder_that_is_moved_away_while_the_walk_is_below_it_ends_nothing(tmp_path: Path, root: int) -> None:
    (tmp_path / "inside").mkdir()
    make_deep(tmp_path / "inside", 3 * MAX_OPEN, "d")
    (tmp_path / "beside").mkdir()
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    moved = tmp_path / "inside" / "/".join("d" * MAX_OPEN)
    walk = Walk(root)
    names = []
    for step in walk:
        names.append((step.name, step.entry is None))
        if step.name == "last":
            moved.rename(outside / "moved")
    assert walk.left_out
    assert ("beside", True) in names
    assert all(not left or name in ("d", "beside", "inside") for name, left in names)


def test_links_and_mounts_are_not_entered(tmp_path: Path, root: int) -> None:
    (tmp_path / "tree/mounted").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/precious").touch()
    (tmp_path / "tree/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "tree/file").touch()
    try:
        mounts.bind(tmp_path / "elsewhere", tmp_path / "tree/mounted")
    except PermissionError:
        pytest.skip("needs root")
    try:
        told = remove_tree(tmp_path / "tree")
    finally:
        mounts.unmount(tmp_path / "tree/mounted")
    assert told == [f"{tmp_path}/tree/mounted: something is mounted on it"]
    assert names(tmp_path / "tree") == ["mounted"]
    assert names(tmp_path / "elsewhere") == ["precious"]
    assert remove_tree(tmp_path / "tree") == []


def test_more_folders_than_a_walk_remembers_are_left_out_and_still_removed(tmp_path: Path, root: int) -> None:
    for number in range(50):
        (tmp_path / "wide" / str(number)).mkdir(parents=True)
        (tmp_path / "wide" / str(number) / "file").touch()
    walk = Walk(root, max_waiting=7)
    assert sum(step.name == "file" for step in walk) < 50
    assert walk.left_out
    assert remove_tree(tmp_path / "wide") == []
    assert names(tmp_path) == []


def test_a_removal_stops_at_its_budget(tmp_path: Path, root: int) -> None:
    for number in range(10):
        (tmp_path / "tree" / str(number)).mkdir(parents=True)
    before = open_descriptors()
    with pytest.raises(OutOfBudgetError):
        Removal(5).remove(root, "tree")
    assert len(names(tmp_path / "tree")) == 5
    assert open_descriptors() == before
    assert Removal(6).remove(root, "tree")


def test_flags_that_forbid_removing_are_taken_away(tmp_path: Path) -> None:
    (tmp_path / "tree/sub").mkdir(parents=True)
    for name in ("tree/file", "tree/sub/log", "tree/other"):
        (tmp_path / name).touch()
    for flag, name in (("+i", "tree/file"), ("+a", "tree/sub/log"), ("+i", "tree/sub")):
        if subprocess.run(["chattr", flag, tmp_path / name], check=False, capture_output=True).returncode:
            pytest.skip("needs a file system with flags, and root")
    assert remove_tree(tmp_path / "tree") == []
    assert names(tmp_path) == []


def test_missing_paths_and_files_are_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("/etc")
    for name in ("gone", "gone/deeper", "file", "link"):
        assert remove_tree(tmp_path / name) == []
    assert names(tmp_path) == []
    assert Path("/etc/passwd").exists()


def test_a_stack_of_folders_goes_back_up_past_what_it_closed(tmp_path: Path, root: int) -> None:
    make_deep(tmp_path, 3 * MAX_OPEN, "d")
    with FolderStack(root) as stack:
        for _ in range(3 * MAX_OPEN):
            stack.enter("d")
        assert stack.depth == 3 * MAX_OPEN
        for depth in reversed(range(3 * MAX_OPEN)):
            assert stack.leave()
            assert stack.depth == depth
            assert names(Path(f"/proc/self/fd/{stack.descriptor}")) == ["d"]
