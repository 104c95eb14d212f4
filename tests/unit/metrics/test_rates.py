"""Nano-cores over a real window, however often they are asked for."""

from __future__ import annotations

import pytest

from metrics.stats import CpuUsage
from metrics.usage import CpuWindow

SECOND = 1_000_000_000


def usage(seconds: float, used: float) -> CpuUsage:
    return CpuUsage(int(seconds * SECOND), int(used * SECOND))


def test_the_first_reading_alone_gives_no_rate() -> None:
    window = CpuWindow()
    assert window.add(usage(100, 50)) is None
    assert window.add(usage(100.1, 50.1)) is None  # 0.1 s is no window
    assert window.add(usage(101, 50.5)) == SECOND // 2


def test_the_start_of_the_container_counts_as_a_reading() -> None:
    window = CpuWindow(started_ns=100 * SECOND)
    assert window.add(usage(102, 1)) == SECOND // 2


def test_the_window_moves_on() -> None:
    window = CpuWindow()
    assert window.add(usage(0, 0)) is None
    for second in range(1, 31):  # one core until 30 s
        assert window.add(usage(second, second)) == SECOND
    rates = [window.add(usage(second, 30)) for second in range(31, 61)]  # then nothing
    assert rates[0] is not None
    assert 0 < rates[0] < SECOND
    assert rates[20:] == [0] * 10  # twenty seconds later the past is forgotten


def test_asking_often_does_not_shorten_the_window() -> None:
    window = CpuWindow()
    window.add(usage(0, 0))
    for tenth in range(1, 200):
        window.add(usage(tenth / 10, 0))
    assert window.add(usage(20, 1)) == SECOND // 10
    assert window.add(usage(25, 1)) == SECOND // 15


@pytest.mark.parametrize(("back", "then"), [((10_002, 0), (10_003, 0.25)), ((6_402, 102), (6_403, 102.25))])
def test_a_decreasing_counter_or_clock_starts_a_new_window(
    back: tuple[float, float], then: tuple[float, float]
) -> None:
    window = CpuWindow()
    window.add(usage(10_000, 100))
    assert window.add(usage(10_001, 101)) == SECOND
    assert window.add(usage(*back)) is None
    assert window.add(usage(*then)) == SECOND // 4
