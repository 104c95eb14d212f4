from __future__ import annotations

import pytest

from cli.bars import bar
from cli.images.pulls import Rates, lines_of
from cli.images.reports import explanation
from proto.podkeel.v1 import agent_pb2

WAITING, RUNNING, DONE = (agent_pb2.LayerProgress.State.Value(name) for name in ("WAITING", "RUNNING", "DONE"))
MIB = 1 << 20


def progress(*layers: tuple[int, int]) -> agent_pb2.PullProgress:
    message = agent_pb2.PullProgress(reference="docker.io/library/app:1", started=1)
    for number, (state, received) in enumerate(layers):
        message.layers.add(digest=f"sha256:{number:064x}", state=state, size=10 * MIB, received=received)
    return message


@pytest.mark.parametrize(
    ("begin", "end", "drawn"),
    [(0, 0, "    "), (0, 0.5, "██  "), (0, 1, "████"), (0, 2, "████"), (0.5, 1, "  ██"), (0, 0.2, "▊   ")],
)
def test_bars(begin: float, end: float, drawn: str) -> None:
    assert bar(begin, end, 4) == drawn


def test_rates_are_of_the_last_seconds() -> None:
    rates = Rates()
    for second, received in enumerate((0, 9 * MIB, 9 * MIB, 9 * MIB, 9 * MIB)):
        rates.take(progress((RUNNING, received)), float(second))
    assert rates.rate(progress((RUNNING, 0)).layers[0]) == 0
    rates.take(progress((RUNNING, 9 * MIB + 3000)), 5.0)
    assert rates.rate(progress((RUNNING, 0)).layers[0]) == pytest.approx(1000)


def test_a_line_for_each_layer_and_one_for_all() -> None:
    rates = Rates()
    rates.take(progress((DONE, 10 * MIB), (RUNNING, 0), (WAITING, 0)), 0.0)
    message = progress((DONE, 10 * MIB), (RUNNING, 5 * MIB), (WAITING, 0))
    rates.take(message, 1.0)
    done, running, waiting, total = lines_of(message, rates, 20)
    assert done.endswith("10 MiB, done")
    assert "█" * 12 + " " * 12 in running
    assert running.endswith("5 MiB of 10 MiB, 5 MiB/s, 1 s left")
    assert waiting.endswith("10 MiB, waiting")
    assert total == "1 of 3 layers, 15 MiB of 30 MiB, 5 MiB/s, 3 s left"
    assert lines_of(progress((RUNNING, 10 * MIB)), rates, 20)[0].endswith("10 MiB, unpacking")


def test_a_small_terminal_shows_what_runs() -> None:
    message = progress((DONE, 10 * MIB), (DONE, 10 * MIB), (WAITING, 0), (RUNNING, MIB))
    lines = lines_of(message, Rates(), 3)
    assert [line.rpartition(" ")[2] for line in lines[:2]] == ["MiB", "waiting"]
    assert lines[2].startswith("2 of 4 layers")
    assert lines_of(agent_pb2.PullProgress(reference="a"), Rates(), 3) == ["a: asking the registry"]


def test_explanations_mark_the_host_that_is_taken() -> None:
    answer = agent_pb2.ExplainImageResponse(reference="r.example/a:1")
    answer.hosts.add(address="http://m/v2", mirror=True, configured_in="f", credentials="none", answer="no")
    for name in ("one", "two"):
        answer.hosts.add(address=f"https://{name}/v2", answered=True, credentials="user u, from f", answer="sha256:1")
    lines = explanation(answer).splitlines()
    assert lines[:3] == ["r.example/a:1", "✗ http://m/v2  (mirror)", "    configured by  f"]
    assert lines[5] == "✓ https://one/v2"
    assert lines[9] == "· https://two/v2"
    assert lines[7] == "    credentials    user u, from f"
