"""The bars of ``podkeel pull`` on a terminal, drawn by rich. Imported only by a command that draws them."""

from __future__ import annotations

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from cli.images.layers import digest_of, reused, sums
from cli.text import duration, size
from proto.podkeel.v1 import agent_pb2

_BAR = 24
_RATE_SECONDS = 3.0
_DONE = agent_pb2.LayerProgress.DONE
_RUNNING = agent_pb2.LayerProgress.RUNNING


class PullBars:
    """A bar for each layer, and a last line for all. Each message is drawn over the one before.

    A small terminal shows the layers that are fetched before those that wait, and these before those that are done.
    ``progress`` is for tests, which bring their own clock.
    """

    def __init__(self, console: Console | None = None, progress: Progress | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._bars = progress or Progress(speed_estimate_period=_RATE_SECONDS)
        self._bars.columns = (TextColumn("{task.description}"), BarColumn(_BAR), _Amount())
        self._tasks: dict[str, TaskID] = {}
        self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")
        self._live.start()

    def show(self, message: agent_pb2.PullProgress) -> None:
        """Draw a message of the agent."""
        if not message.layers:
            if not message.image_id:
                self._live.update(Text(f"{message.reference}: asking the registry"), refresh=True)
            return
        shown = self._shown(message)
        for layer in message.layers:
            task = self._task(layer)
            self._bars.update(task, completed=layer.received, state=layer.state, visible=layer.digest in shown)
        self._live.update(Group(self._bars, self._sum(message)), refresh=True)

    def end(self) -> None:
        """Keep the last drawing, and show the cursor again."""
        self._live.stop()

    def _task(self, layer: agent_pb2.LayerProgress) -> TaskID:
        if layer.digest not in self._tasks:
            self._tasks[layer.digest] = self._bars.add_task(
                digest_of(layer), total=layer.size, completed=layer.received, state=layer.state
            )
        return self._tasks[layer.digest]

    def _shown(self, message: agent_pb2.PullProgress) -> set[str]:
        order = {_RUNNING: 0, _DONE: 2}
        layers = sorted(message.layers, key=lambda layer: order.get(layer.state, 1))
        return {layer.digest for layer in layers[: max(self._console.height - 3, 1)]}

    def _sum(self, message: agent_pb2.PullProgress) -> Text:
        received, total = sums(message.layers)
        done = sum(layer.state == _DONE for layer in message.layers)
        rate = sum(task.speed or 0.0 for task in self._bars.tasks if task.fields["state"] == _RUNNING)
        amount = f"{size(received)} of {size(total)}{_pace(rate, total - received)}"
        return Text(
            f"{done} of {len(message.layers)} layers, {amount}{reused(message.layers)}", no_wrap=True, overflow="crop"
        )


class _Amount(ProgressColumn):
    """The text beside a bar."""

    def render(self, task: Task) -> Text:
        total, state = task.total or 0, task.fields["state"]
        if state == _DONE:
            words = f"{size(total)}, done"
        elif state == _RUNNING and task.completed >= total:
            words = f"{size(total)}, unpacking"
        elif state == _RUNNING:
            words = f"{size(task.completed)} of {size(total)}{_pace(task.speed or 0.0, total - task.completed)}"
        else:
            words = f"{size(total)}, waiting"
        return Text(words, no_wrap=True)


def _pace(rate: float, left: float) -> str:
    return f", {size(rate)}/s, {duration(max(left, 0) / rate)} left" if rate > 0 else ""
