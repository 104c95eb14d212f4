from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from host.errors import LimitError
from host.files import descriptors
from host.files.descriptors import Use


@contextmanager
def more_open(count: int) -> Iterator[None]:
    with ExitStack() as stack:
        for _ in range(count):
            stack.callback(os.close, os.open("/", os.O_PATH))
        yield


class OlderFolder:
    """/proc/self/fd as a kernel before Linux 6.2 shows it."""

    def stat(self) -> os.stat_result:
        return os.stat_result((0,) * 10)

    def iterdir(self) -> Iterator[Path]:
        return Path("/proc/self/fd").iterdir()


@pytest.fixture(params=["reported by the kernel", "counted"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "counted":  # as before Linux 6.2
        monkeypatch.setattr("host.files.descriptors.FOLDER", OlderFolder())
    elif not Path("/proc/self/fd").stat().st_size:
        pytest.skip("this kernel does not report the number of descriptors (Linux 6.2)")


def set_limit(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr("host.files.descriptors.resource.getrlimit", lambda _: (limit, limit))


@pytest.mark.usefixtures("way")
def test_open_descriptors_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    set_limit(monkeypatch, 400)
    with more_open(250):
        before = descriptors.left()
        with more_open(40):
            assert descriptors.left() == before - 40


@pytest.mark.usefixtures("way")
def test_streams_and_images_give_way_first_and_then_what_makes_containers(monkeypatch: pytest.MonkeyPatch) -> None:
    set_limit(monkeypatch, 400)
    opened = 400 - descriptors.left()
    descriptors.require("a stream")
    with more_open(400 - 80 - opened):
        assert descriptors.scarce()
        assert not descriptors.scarce(Use.MAKING)
        with pytest.raises(LimitError, match="a stream is refused: 80 of the agent's 400 file descr"):
            descriptors.require("a stream")
        descriptors.require("a pod", Use.MAKING)
    with more_open(400 - 30 - opened), pytest.raises(LimitError, match="a pod"):
        descriptors.require("a pod", Use.MAKING)


@pytest.mark.usefixtures("way")
def test_nothing_is_counted_if_many_remain(monkeypatch: pytest.MonkeyPatch) -> None:
    set_limit(monkeypatch, 1 << 20)
    monkeypatch.setattr(OlderFolder, "iterdir", lambda folder: pytest.fail("it took too long"))
    assert not descriptors.scarce()
