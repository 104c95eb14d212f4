"""``podkeel pull`` and ``podkeel image pulls``: pulls and how far they are."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence

from cli.bars import bar
from cli.connect import connect
from cli.images.images import credentials
from cli.text import age, duration, size, table
from host.errors import PodkeelError
from proto.podkeel.v1 import agent_pb2

_BAR = 24
_RATE_SECONDS = 3.0
_DONE = agent_pb2.LayerProgress.DONE
_RUNNING = agent_pb2.LayerProgress.RUNNING


def pull(options: argparse.Namespace) -> None:
    """Print the image's id; on standard error a bar for each layer on a terminal, else a line for each that is done."""
    request = agent_pb2.PullRequest(reference=options.reference, auth=credentials(options))
    image_id = ""
    with connect(options) as client:
        messages = client.stream(request, agent_pb2.PullProgress, f"pull {options.reference}")
        display = _Bars() if sys.stderr.isatty() else _Lines()
        try:
            for message in messages:
                display.show(message)
                image_id = message.image_id
        finally:
            display.end()
    if not image_id:
        raise PodkeelError(f"pull {options.reference}: the agent ended before the image was complete")
    print(image_id)


def list_pulls(options: argparse.Namespace) -> None:
    """A line for each pull that runs now."""
    with connect(options) as client:
        answer = client.call(agent_pb2.ListPullsRequest(), agent_pb2.ListPullsResponse, "list pulls")
    rows = []
    for item in answer.pulls:
        received, total = _bytes(item.layers)
        done = sum(layer.state == _DONE for layer in item.layers)
        amount = f"{size(received)} of {size(total)}" if item.layers else "-"
        rows.append((item.reference, f"{done} of {len(item.layers)}", amount, age(item.started)))
    print(table(("IMAGE", "LAYERS", "BYTES", "SINCE"), rows))


class _Lines:
    """For logs and pipes: each layer once, when it is done."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def show(self, message: agent_pb2.PullProgress) -> None:
        done = sum(layer.state == _DONE for layer in message.layers)
        for layer in message.layers:
            if layer.state == _DONE and layer.digest not in self._told:
                self._told.add(layer.digest)
                text = f"layer {_short(layer)} is there, {size(layer.size)} ({done} of {len(message.layers)})"
                print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Nothing to take back."""


class _Bars:
    """For terminals: the lines of the last message are drawn over by the next."""

    def __init__(self) -> None:
        self._drawn = 0
        self._rates = Rates()

    def show(self, message: agent_pb2.PullProgress) -> None:
        self._rates.take(message, time.monotonic())
        columns, rows = shutil.get_terminal_size()
        lines = [line[: columns - 1] for line in lines_of(message, self._rates, rows - 2)]
        back = f"\x1b[{self._drawn}A" if self._drawn else ""
        print(f"{back}\r\x1b[J" + "\n".join(lines), file=sys.stderr, flush=True)
        self._drawn = len(lines)

    def end(self) -> None:
        """The last lines stay."""


class Rates:
    """Bytes per second of each layer over the last seconds."""

    def __init__(self) -> None:
        self._samples: dict[str, list[tuple[float, int]]] = {}

    def take(self, message: agent_pb2.PullProgress, now: float) -> None:
        """Record the progress at the time ``now``, in seconds."""
        for layer in message.layers:
            samples = self._samples.setdefault(layer.digest, [])
            samples.append((now, layer.received))
            while len(samples) > 2 and now - samples[1][0] >= _RATE_SECONDS:
                samples.pop(0)

    def rate(self, layer: agent_pb2.LayerProgress) -> float:
        """Of one layer; 0 while nothing is known."""
        samples = self._samples.get(layer.digest, ())
        if len(samples) < 2 or samples[-1][0] <= samples[0][0]:
            return 0.0
        return (samples[-1][1] - samples[0][1]) / (samples[-1][0] - samples[0][0])


def lines_of(message: agent_pb2.PullProgress, rates: Rates, most: int) -> list[str]:
    """A bar for each layer, those that run first if there are more than ``most`` lines; the last line is the sum."""
    if not message.layers:
        return [f"{message.reference}: asking the registry"] if not message.image_id else []
    layers = list(message.layers)
    if len(layers) >= most:
        order = {_RUNNING: 0, _DONE: 2}
        layers = sorted(layers, key=lambda layer: order.get(layer.state, 1))[: max(most - 1, 1)]
    lines = [_line(layer, rates) for layer in layers]
    received, total = _bytes(message.layers)
    done = sum(layer.state == _DONE for layer in message.layers)
    rate = sum(rates.rate(layer) for layer in message.layers if layer.state == _RUNNING)
    amount = f"{size(received)} of {size(total)}{_pace(rate, total - received)}"
    lines.append(f"{done} of {len(message.layers)} layers, {amount}")
    return lines


def _line(layer: agent_pb2.LayerProgress, rates: Rates) -> str:
    if layer.state == _DONE:
        words = f"{size(layer.size)}, done"
    elif layer.state == _RUNNING and layer.received >= layer.size:
        words = f"{size(layer.size)}, unpacking"
    elif layer.state == _RUNNING:
        pace = _pace(rates.rate(layer), layer.size - layer.received)
        words = f"{size(layer.received)} of {size(layer.size)}{pace}"
    else:
        words = f"{size(layer.size)}, waiting"
    part = layer.received / layer.size if layer.size > 0 else float(layer.state == _DONE)
    return f"{_short(layer)}  {bar(0, part, _BAR)}  {words}"


def _pace(rate: float, left: int) -> str:
    return f", {size(rate)}/s, {duration(max(left, 0) / rate)} left" if rate > 0 else ""


def _bytes(layers: Sequence[agent_pb2.LayerProgress]) -> tuple[int, int]:
    return sum(layer.received for layer in layers), sum(layer.size for layer in layers)


def _short(layer: agent_pb2.LayerProgress) -> str:
    return layer.digest.partition(":")[2][:12]
