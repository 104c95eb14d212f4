"""Counting what containers wrote, in the background."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from images import writable
from images.options import ImageOptions
from images.project_quota import ProjectQuotas
from images.writable import WritableLayers, WritableUsage
from tests.support.agent import wait_for


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


def test_first_answer_is_the_folder_itself(layers: WritableLayers, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    first = layers.usage("a")
    assert first is not None
    assert (first.used_bytes, first.inodes) == (taken(tmp_path / "a"), 1)


def test_what_is_not_there_has_no_answer(layers: WritableLayers) -> None:
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


def test_what_is_forgotten_stays_forgotten(layers: WritableLayers, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    layers.usage("a")
    layers.forget("a")
    (tmp_path / "a").rmdir()
    counted(layers, "b")  # whatever was asked for before has been served
    assert layers.usage("a") is None


def test_closing_cuts_a_long_count_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writable, "_DUTY", 1e-6)  # the first rest is for hours
    monkeypatch.setattr(writable, "_BATCH", 1)
    layers = WritableLayers(lambda container_id: tmp_path)
    first = layers.usage("a")
    layers.close()
    assert layers.usage("a") == first


def test_where_there_are_no_quotas_the_reason_is_told_and_layers_are_counted() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:  # tmpfs has none
        quotas = ProjectQuotas(Path(folder), (1000, 2000))
        layers = WritableLayers(lambda container_id: Path(folder) / container_id / "upper", quotas)
        try:
            reason = layers.open()
            assert reason == layers.counted_because != ""
            assert not list(Path(folder).iterdir())
            (Path(folder) / "a/upper").mkdir(parents=True)
            layers.give_project("a")
            layers.measure_own("a")
            assert counted(layers, "a").inodes == 1
        finally:
            layers.close()


@pytest.mark.parametrize("ids", [(0, 5), (7, 6), (1, 0xFFFFFFFF)])
def test_ranges_of_projects_that_cannot_be(ids: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="project_ids"):
        ImageOptions(project_ids=ids)
