from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console
from rich.progress import Progress

from cli.images.pull_bars import PullBars
from cli.images.reports import explanation
from cli.text import bar
from proto.podkeel.v1 import agent_pb2

WAITING, RUNNING, DONE = (agent_pb2.LayerProgress.State.Value(name) for name in ("WAITING", "RUNNING", "DONE"))
MIB = 1 << 20


def progress(*layers: tuple[int, int]) -> agent_pb2.PullProgress:
    message = agent_pb2.PullProgress(reference="docker.io/library/app:1", started=1)
    for number, (state, received) in enumerate(layers):
        message.layers.add(digest=f"sha256:{number:064x}", state=state, size=10 * MIB, received=received)
    return message


class Drawing:
    """Bars on a terminal of a test, whose clock the test sets."""

    def __init__(self, height: int = 30) -> None:
        self.now = 0.0
        self._text = io.StringIO()
        console = Console(file=self._text, force_terminal=True, color_system=None, width=100, height=height)
        self._bars = PullBars(console, Progress(speed_estimate_period=3.0, get_time=lambda: self.now))

    def after(self, now: float, message: agent_pb2.PullProgress) -> list[str]:
        """The lines of the message's drawing at that time, in seconds."""
        self.now = now
        self._text.seek(0)
        self._text.truncate()
        self._bars.show(message)
        return [line.rstrip() for line in self._text.getvalue().rpartition("\x1b[2K")[2].splitlines()]


@pytest.mark.parametrize(
    ("begin", "end", "drawn"),
    [(0, 0, "    "), (0, 0.5, "██  "), (0, 1, "████"), (0, 2, "████"), (0.5, 1, "  ██"), (0, 0.2, "▊   ")],
)
def test_bars(begin: float, end: float, drawn: str) -> None:
    assert bar(begin, end, 4) == drawn


def test_rates_are_of_the_last_seconds() -> None:
    drawing = Drawing()
    for second, received in enumerate((0, 3 * MIB, 6 * MIB)):
        lines = drawing.after(float(second), progress((RUNNING, received)))
    assert lines[-1] == "0 of 1 layers, 6 MiB of 10 MiB, 3 MiB/s, 1 s left"
    lines = drawing.after(9.0, progress((RUNNING, 6 * MIB)))
    assert lines[-1] == "0 of 1 layers, 6 MiB of 10 MiB"


def test_a_line_for_each_layer_and_one_for_all() -> None:
    drawing = Drawing()
    drawing.after(0.0, progress((DONE, 10 * MIB), (RUNNING, 0), (WAITING, 0)))
    drawing.after(1.0, progress((DONE, 10 * MIB), (RUNNING, MIB), (WAITING, 0)))
    done, running, waiting, total = drawing.after(2.0, progress((DONE, 10 * MIB), (RUNNING, 5 * MIB), (WAITING, 0)))
    assert done.endswith("10 MiB, done")
    assert running.startswith("000000000000 " + "━" * 12)
    assert running.endswith("5 MiB of 10 MiB, 4 MiB/s, 1 s left")
    assert waiting.endswith("10 MiB, waiting")
    assert total == "1 of 3 layers, 15 MiB of 30 MiB, 4 MiB/s, 4 s left"
    assert Drawing().after(0.0, progress((RUNNING, 10 * MIB)))[0].endswith("10 MiB, unpacking")


def test_a_small_terminal_shows_what_runs() -> None:
    message = progress((DONE, 10 * MIB), (DONE, 10 * MIB), (WAITING, 0), (RUNNING, MIB))
    lines = Drawing(height=5).after(0.0, message)
    assert [line.rpartition(" ")[2] for line in lines[:2]] == ["waiting", "MiB"]
    assert lines[2].startswith("2 of 4 layers")
    assert Drawing().after(0.0, agent_pb2.PullProgress(reference="a")) == ["a: asking the registry"]


@pytest.mark.parametrize("command", [("ps",), ("images",), ("pull", "a"), ("image", "pulls")])
def test_rich_is_not_loaded_where_no_bar_is_drawn(command: tuple[str, ...]) -> None:
    """Loading it takes a tenth of a second, twice as long as ``podkeel ps`` itself."""
    code = "import sys; from cli.main import main; main(sys.argv[1:]); print([m for m in sys.modules if 'rich' in m])"
    words = (*command, "--socket", "unix:///absent")
    ran = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert "podkeel: " in ran.stderr
    assert ran.stdout == "[]\n"


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
