"""``podkeel pull`` and ``podkeel image pulls``: pulls and how far they are."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Protocol

from cli.connect import connect
from cli.images.images import credentials
from cli.images.layers import digest_of, reused, sums
from cli.text import age, size, table
from host.errors import PodkeelError
from proto.podkeel.v1 import agent_pb2

_DONE = agent_pb2.LayerProgress.DONE


def pull(options: argparse.Namespace) -> None:
    """Print the image's id; on standard error a bar for each layer on a terminal, else a line for each that is done."""
    request = agent_pb2.PullRequest(reference=options.reference, auth=credentials(options))
    image_id = ""
    with connect(options) as client:
        messages = client.stream(request, agent_pb2.PullProgress, f"pull {options.reference}")
        display = _display()
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
    """Print a line for each pull that runs now."""
    with connect(options) as client:
        answer = client.call(agent_pb2.ListPullsRequest(), agent_pb2.ListPullsResponse, "list pulls")
    rows = []
    for item in answer.pulls:
        received, total = sums(item.layers)
        done = sum(layer.state == _DONE for layer in item.layers)
        amount = f"{size(received)} of {size(total)}" if item.layers else "-"
        rows.append((item.reference, f"{done} of {len(item.layers)}", amount, age(item.started)))
    print(table(("IMAGE", "LAYERS", "BYTES", "SINCE"), rows))


class _Display(Protocol):
    def show(self, message: agent_pb2.PullProgress) -> None: ...

    def end(self) -> None: ...


def _display() -> _Display:
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        return _Lines()
    # rich takes a tenth of a second to load, so it is loaded only to draw bars
    from cli.images.pull_bars import PullBars

    return PullBars()


class _Lines:
    """For logs and pipes: each layer once, when it is done."""

    def __init__(self) -> None:
        self._printed: set[str] = set()

    def show(self, message: agent_pb2.PullProgress) -> None:
        done = sum(layer.state == _DONE for layer in message.layers)
        for layer in message.layers:
            if layer.state == _DONE and layer.digest not in self._printed:
                self._printed.add(layer.digest)
                amount = f"{size(layer.size)}{reused([layer])}"
                text = f"layer {digest_of(layer)} is complete, {amount} ({done} of {len(message.layers)})"
                print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Do nothing: each line is complete when it is printed."""
