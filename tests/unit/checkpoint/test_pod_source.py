"""What is taken from the folder of a pod's checkpoint, which anybody may have written."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from host.errors import InvalidArgumentError, LimitError, PodkeelError
from runtime.checkpoint.pod.document import PodDocument
from runtime.checkpoint.pod.source import PodSource, compare, highest_pid
from tests.support.pods import container_config

OWN = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The folder of a checkpoint of one container."""
    images = tmp_path / "place" / "containers" / "0" / "checkpoint"
    images.mkdir(parents=True)
    for name in ("inventory.img", "core-7.img", "core-12.img", "pages-1.img", "descriptors.json"):
        (images / name).write_text(f"content of {name}")
    (images.parent / "config.dump").write_text("{}")
    (images.parent / "rootfs-diff.tar").write_bytes(bytes(1024))
    (images.parent / "spec.dump").write_text("not taken")
    container = {"name": "main", "folder": "containers/0", "imageId": "sha256:1", "envs": {"TOKEN": "hidden"}}
    document = {"version": 1, "machine": OWN, "containers": [container]}
    (tmp_path / "place" / "pod.json").write_text(json.dumps(document))
    return tmp_path / "place"


def take(place: Path, target: Path, max_bytes: int = 1 << 20) -> PodDocument:
    """Read the document, and take the first container to ``target``."""
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        source = PodSource(descriptor, "checkpoint", max_bytes)
        document = source.read()
        source.take(document.containers[0], target, lambda: None)
        assert not source.take_shared_memory(target / "shm.tar", lambda: None)
        return document
    finally:
        os.close(descriptor)


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """A folder on another file system."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def test_what_decides_about_rights_is_copied_and_memory_is_shared(place: Path, tmp_path: Path) -> None:
    take(place, tmp_path / "taken")
    taken, images = tmp_path / "taken" / "checkpoint", place / "containers/0/checkpoint"
    assert {path.name for path in taken.iterdir()} == {path.name for path in images.iterdir()}
    assert not (tmp_path / "taken" / "spec.dump").exists()
    assert highest_pid(tmp_path / "taken") == 12
    (images / "core-7.img").write_text("other rights")
    assert (taken / "core-7.img").read_text() == "content of core-7.img"
    assert (taken / "pages-1.img").read_text() == "content of pages-1.img"


def test_memory_on_another_file_system_is_copied(place: Path, elsewhere: Path) -> None:
    take(place, elsewhere / "taken")
    assert (elsewhere / "taken/checkpoint/pages-1.img").read_text() == "content of pages-1.img"
    assert (elsewhere / "taken/rootfs-diff.tar").read_bytes() == bytes(1024)


def _linked(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def _document(place: Path, **changes: Any) -> None:
    content = json.loads((place / "pod.json").read_text())
    content.update(changes)
    (place / "pod.json").write_text(json.dumps(content))


def _folder(place: Path, folder: str) -> None:
    _document(place, containers=[{"name": "main", "folder": folder, "imageId": "x"}])


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 43)


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no document": (lambda place: (place / "pod.json").unlink(), "no checkpoint of a pod"),
    "a deep document": (lambda place: (place / "pod.json").write_text("[" * 100_000), "cannot be read"),
    "a large document": (lambda place: (place / "pod.json").write_text(" " * (5 << 20)), "cannot be read"),
    "a fifo": (lambda place: _fifo(place / "pod.json"), "not a regular file"),
    "a later version": (lambda place: _document(place, version=2), "version 2"),
    "another machine": (lambda place: _document(place, machine="s390x"), "made on 's390x'"),
    "no containers": (lambda place: _document(place, containers=[]), "has 0 containers"),
    "a way out": (lambda place: _folder(place, "containers/../../etc"), "the invalid folder"),
    "an absolute path": (lambda place: _folder(place, "/etc"), "the invalid folder"),
    "a missing folder": (lambda place: _folder(place, "containers/7"), "has no containers/7"),
    "the document a link": (lambda place: _linked(place / "pod.json"), "is a link"),
    "containers a link": (lambda place: _linked(place / "containers"), "is a link"),
    "a container a link": (lambda place: _linked(place / "containers/0"), "is a link"),
    "the images a link": (lambda place: _linked(place / "containers/0/checkpoint"), "is a link"),
    "memory a link": (lambda place: _linked(place / "containers/0/checkpoint/pages-1.img"), "is a link"),
    "a device": (
        lambda place: os.mknod(place / "containers/0/checkpoint/x.img", 0o020600, os.makedev(1, 5)),
        "not a regular file",
    ),
    "an odd name": (lambda place: (place / "containers/0/checkpoint/.x").touch(), "'.x'"),
    "no images": (lambda place: shutil.rmtree(place / "containers/0/checkpoint"), "has no checkpoint"),
    "a large file": (lambda place: _huge(place / "containers/0/checkpoint/tmpfs-1.tar"), "is too large"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_folders(place: Path, tmp_path: Path, name: str) -> None:
    change, words = HOSTILE[name]
    change(place)
    with pytest.raises((InvalidArgumentError, LimitError)) as failure:
        take(place, tmp_path / "taken")
    assert words in failure.value.message


def test_work_that_is_given_up_ends(place: Path, tmp_path: Path) -> None:
    def check() -> None:
        raise PodkeelError("given up")

    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        source = PodSource(descriptor, "checkpoint", 1 << 20)
        with pytest.raises(PodkeelError, match="given up"):
            source.take(source.read().containers[0], tmp_path / "taken", check)
    finally:
        os.close(descriptor)


def test_values_of_variables_are_not_printed(place: Path, tmp_path: Path) -> None:
    document = take(place, tmp_path / "taken")
    with pytest.raises(InvalidArgumentError) as failure:
        compare(document, [container_config("main", "sh")], "sandbox x")
    assert "'main' differs from the checkpoint" in failure.value.message
    assert "command" in failure.value.message
    assert "envs 'TOKEN'" in failure.value.message
    assert "hidden" not in failure.value.message
    with pytest.raises(InvalidArgumentError, match="'main' is missing; 'other' is not in the checkpoint"):
        compare(document, [container_config("other", "sh")], "sandbox x")
