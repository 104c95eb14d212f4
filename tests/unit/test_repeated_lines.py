"""The same problem fills no log: repeated lines are counted, and the count is logged after a minute."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator

import pytest

from cri.telemetry.repeated_lines import RepeatedLines

Lines = Callable[[], list[str]]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("cri.telemetry.repeated_lines.time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def lines(clock: list[float]) -> Iterator[Lines]:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    handler.addFilter(RepeatedLines(handler))
    log = logging.getLogger("podkeel.test")
    log.propagate, log.handlers = False, [handler]
    log.setLevel("DEBUG")
    yield lambda: written.getvalue().splitlines()
    log.propagate, log.handlers = True, []


LOG = logging.getLogger("podkeel.test")


def test_equal_warnings_pass_three_times_a_minute_and_the_rest_is_counted(lines: Lines, clock: list[float]) -> None:
    for _ in range(1000):
        LOG.warning("pod %s: %s", "a", "no room")
    assert lines() == ["WARNING pod a: no room"] * 3
    clock[0] += 61
    LOG.error("another")
    assert lines()[3:] == ["WARNING 997 more lines like this in 60 s: pod a: no room", "ERROR another"]
    LOG.warning("pod %s: %s", "a", "no room")
    assert lines()[-1] == "WARNING pod a: no room"


def test_a_traceback_is_written_once_a_minute(lines: Lines) -> None:
    for _ in range(50):
        try:
            raise OSError(24, "Too many open files")
        except OSError:
            LOG.exception("accept failed")
    assert len([line for line in lines() if line.startswith("Traceback")]) == 1


def test_one_trouble_of_many_objects_passes_three_hundred_times_a_minute(lines: Lines) -> None:
    for number in range(5000):
        LOG.warning("container %s: no descriptor is left", number)
    assert len(lines()) == 300


def test_an_event_is_always_logged(lines: Lines) -> None:
    for _ in range(500):
        LOG.info("container started")
    assert len(lines()) == 500


def test_memory_is_bounded(lines: Lines) -> None:
    for number in range(3000):
        LOG.warning(f"line {number}")  # each its own message
    handler = LOG.handlers[0]
    (repeated,) = handler.filters
    assert isinstance(repeated, RepeatedLines)
    assert repeated.remembered <= 1000
