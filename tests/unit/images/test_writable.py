"""Counting what containers wrote, in the background."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from host.files import file_tree
from images.options import ImageOptions
from images.snapshots import usage as writable
from images.snapshots.project_quota import ProjectQuotas
from images.snapshots.usage import WritableLayers, WritableUsage
from tests.support.agent import wait_for
from tests.support.descriptors import descriptors_left


@pytest.fixture
def layers(tmp_path: Path) -> Iterator[WritableLayers]:
    made = WritableLayers(lambda container_id: tmp_path / container_id)
    yield made
    made.close()


def counted(layers: WritableLayers, container_id: str) -> WritableUsage:
    """The first real count."""
    first = layers.usage(container_id)
    assert first is not None
    wait_for(lambda: layers.usage(container_id) != first, what="the count")
    usage = layers.usage(container_id)
    assert usage is not None
    assert usage.time_ns > first.time_ns
    return usage


def taken(path: Path) -> int:
    return path.lstat().st_blocks * 512


def test_everything_is_counted_once(layers: WritableLayers, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "file").write_bytes(os.urandom(100_000))
    (folder / "sparse").touch()
    os.truncate(folder / "sparse", 1 << 30)
    (folder / "deep" / "same").hardlink_to(folder / "file")
    (folder / "deep" / "link").symlink_to("/etc")
    os.mkfifo(folder / "pipe")
    usage = counted(layers, "a")
    assert usage.inodes == 7
    parts = [folder, folder / "deep", folder / "deep/er", folder / "file", folder / "sparse", folder / "deep/link"]
    assert usage.used_bytes == sum(map(taken, parts))
    assert 100_000 < usage.used_bytes < 200_000


def test_a_link_that_took_a_folder_s_place_leads_nowhere(
    layers: WritableLayers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container may put one there at any moment; the agent must not count the node's files, or hang in them."""
    (tmp_path / "host" / "one" / "two").mkdir(parents=True)
    (tmp_path / "a" / "folder" / "below").mkdir(parents=True)
    real = file_tree.open_below

    def swap_and_open(folder: int, name: str, flags: int, resolve: int) -> int:
        if name == "folder":
            (tmp_path / "a" / "folder").rename(tmp_path / "taken")
            (tmp_path / "a" / "folder").symlink_to(tmp_path / "host")
        return real(folder, name, flags, resolve)

    monkeypatch.setattr(file_tree, "open_below", swap_and_open)
    assert counted(layers, "a").inodes == 2
    assert (tmp_path / "a" / "folder").is_symlink()


def test_trees_deeper_than_paths_are_long_are_counted(layers: WritableLayers, tmp_path: Path) -> None:
    depth, name = 1500, "ten_signs_"
    (tmp_path / "a").mkdir()
    before = open_descriptors()
    folder = os.open(tmp_path / "a", os.O_RDONLY)
    try:
        for _ in range(depth):
            os.mkdir(name, dir_fd=folder)
            folder, above = os.open(name, os.O_RDONLY, dir_fd=folder), folder
            os.close(above)
        os.close(folder)
        assert counted(layers, "a").inodes == depth + 1
        wait_for(lambda: open_descriptors() <= before, what="that no descriptor is left")
    finally:
        subprocess.run(["rm", "-rf", str(tmp_path / "a")], check=True)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_first_answer_is_the_folder_itself(layers: WritableLayers, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    first = layers.usage("a")
    assert first is not None
    assert (first.used_bytes, first.inodes) == (taken(tmp_path / "a"), 1)


def test_an_unknown_layer_has_no_usage(layers: WritableLayers) -> None:
    assert layers.usage("nothing") is None


def test_old_counts_are_renewed_when_asked_for(
    layers: WritableLayers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writable, "OLDEST_SECONDS", 0.05)
    (tmp_path / "a" / "one").mkdir(parents=True)
    assert counted(layers, "a").inodes == 2
    (tmp_path / "a" / "two").mkdir()

    def inodes() -> int:
        usage = layers.usage("a")
        return usage.inodes if usage is not None else 0

    wait_for(lambda: inodes() == 3, what="a new count")


def count_again(layers: WritableLayers, container_id: str) -> WritableUsage:
    """The first answer that is newer than the one there is."""
    known = layers.usage(container_id)
    assert known is not None

    def newer() -> bool:
        usage = layers.usage(container_id)
        return usage is not None and usage.time_ns > known.time_ns

    wait_for(newer, what="a newer answer")
    usage = layers.usage(container_id)
    assert usage is not None
    return usage


def test_what_did_not_run_is_not_walked(
    layers: WritableLayers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writable, "OLDEST_SECONDS", 0.05)
    activity: dict[str, int | None] = {"a": 7}
    layers.activity = activity.get
    (tmp_path / "a").mkdir()
    assert counted(layers, "a").inodes == 1
    (tmp_path / "a" / "one").mkdir()
    assert count_again(layers, "a").inodes == 1
    activity["a"] = 8
    wait_for(lambda: count_again(layers, "a").inodes == 2, what="a count after it ran")
    (tmp_path / "a" / "two").mkdir()
    assert count_again(layers, "a").inodes == 2
    activity["a"] = None  # unknown
    wait_for(lambda: count_again(layers, "a").inodes == 3, what="a count")


def test_no_count_is_trusted_for_good(layers: WritableLayers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writable, "OLDEST_SECONDS", 0.02)
    monkeypatch.setattr(writable, "TRUSTED_SECONDS", 0.2)
    layers.activity = lambda _: 7
    (tmp_path / "a").mkdir()
    assert counted(layers, "a").inodes == 1
    (tmp_path / "a" / "one").mkdir()
    wait_for(lambda: count_again(layers, "a").inodes == 2, what="a count though nothing ran")


def test_large_trees_share_a_small_part_of_a_core(
    layers: WritableLayers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writable, "OLDEST_SECONDS", 0.0)
    monkeypatch.setattr(writable, "TOTAL_SHARE", 0.02)
    names = ["a", "b", "c"]
    for name in names:
        (tmp_path / name).mkdir()
        for number in range(600):
            (tmp_path / name / str(number)).touch()
        assert counted(layers, name).inodes == 601
    (counting,) = [thread for thread in threading.enumerate() if thread.name == "writable-layers"]
    assert counting.ident is not None
    clock = time.pthread_getcpuclockid(counting.ident)
    for name in names:
        count_again(layers, name)  # each pause is as long as all three ask for by now
    begin, used = time.monotonic(), time.clock_gettime(clock)
    rounds = 0
    while time.monotonic() < begin + 1.0:
        for name in names:
            layers.usage(name)
        rounds += 1
        time.sleep(0.001)
    share = (time.clock_gettime(clock) - used) / (time.monotonic() - begin)
    assert rounds > 20
    assert share < 0.06  # 0.02, and one count may fall in more than belongs to that second


def test_folders_of_image_volumes_are_counted(tmp_path: Path) -> None:
    layers = WritableLayers(lambda container_id: tmp_path / container_id / "upper")
    try:
        (tmp_path / "a" / "upper").mkdir(parents=True)
        (tmp_path / "a" / "work" / "work").mkdir(parents=True)
        (tmp_path / "a" / "volumes" / "data").mkdir(parents=True)
        (tmp_path / "a" / "volumes" / "data" / "file").write_bytes(os.urandom(100_000))
        usage = counted(layers, "a")
        assert usage.inodes == 4
        assert usage.used_bytes >= 100_000
    finally:
        layers.close()


def test_what_is_forgotten_stays_forgotten(layers: WritableLayers, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    layers.usage("a")
    layers.forget("a")
    (tmp_path / "a").rmdir()
    counted(layers, "b")  # every earlier request has been served
    assert layers.usage("a") is None


def test_closing_cuts_a_long_count_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writable, "COUNT_SHARE", 1e-6)  # the first rest is for hours
    monkeypatch.setattr(writable, "BATCH", 1)
    layers = WritableLayers(lambda container_id: tmp_path)
    first = layers.usage("a")
    layers.close()
    assert layers.usage("a") == first


def test_without_quotas_the_reason_is_logged_and_layers_are_counted() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:  # tmpfs has none
        quotas = ProjectQuotas(Path(folder), (1000, 2000))
        layers = WritableLayers(lambda container_id: Path(folder) / container_id / "upper", quotas)
        try:
            reason = layers.open()
            assert reason == layers.counted_because != ""
            assert not list(Path(folder).iterdir())
            (Path(folder) / "a/upper").mkdir(parents=True)
            layers.assign_project("a")
            layers.measure_own("a")
            assert counted(layers, "a").inodes == 1
        finally:
            layers.close()


@pytest.mark.parametrize("ids", [(0, 5), (7, 6), (1, 0xFFFFFFFF)])
def test_ranges_of_projects_that_cannot_be(ids: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="project_ids"):
        ImageOptions(project_ids=ids)


def test_counting_continues_after_a_lack_of_descriptors(
    layers: WritableLayers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(writable, "OLDEST_SECONDS", 0.05)
    (tmp_path / "a" / "one").mkdir(parents=True)
    with descriptors_left(1):  # for the folder, none to walk it
        layers.usage("a")
        wait_for(lambda: "cannot be counted" in caplog.text, what="a failed count")
    assert counted(layers, "a").inodes == 2
