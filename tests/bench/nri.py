"""The NRI phase: what plugins of the node add to a pod's whole cycle.

One Podkeel is measured. Its plugins come and go between rounds of cycles: none, one that subscribes to every event, and
a hundred that subscribe to none that occurs. The plugins are Python; what they need for an answer is in the result.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from scripts.build_busybox_image import busybox_image
from tests.bench import report, servers
from tests.bench.goals import Goal
from tests.bench.samples import Samples, percentile
from tests.bench.workload import Workload

_IMAGE = "localhost/bench/busybox:1"
_CYCLES = 5  # of a round
_CALLS = ("RunPodSandbox", "CreateContainer", "StartContainer", "StopContainer(0)", "RemoveContainer")
_NONE, _ONE, _HUNDRED = "no plugin", "one, all events", "100, no events"
_PLUGINS = {_NONE: 0, _ONE: 1, _HUNDRED: 100}


def measure(folder: Path, runtime: str, cidr: str, rounds: int, *, cgroup_parent: str) -> dict[str, Samples]:
    """Durations of calls and cycles by the plugins that were there; they take turns in changing order."""
    archive, path = folder / "busybox.tar", folder / "nri.sock"
    busybox_image().write_docker(archive, _IMAGE)
    settings = f'[nri]\nsocket = "{path}"\nplugin_dir = "{folder}/plugins"\n'
    found = {name: Samples() for name in _PLUGINS}
    with servers.podkeel(folder / "podkeel", runtime, cidr, _IMAGE, archive, settings=settings) as client:
        logs = folder / "logs"
        logs.mkdir()
        workload = Workload(client, "podkeel", image=_IMAGE, handler="", cgroup_parent=cgroup_parent, logs=logs)
        with contextlib.closing(workload):
            for _ in range(rounds):
                for name in random.sample(list(_PLUGINS), len(_PLUGINS)):
                    with _plugins(path, _PLUGINS[name]):
                        workload.cycle(Samples())  # the first one pays for what the last plugins left behind
                        for _ in range(_CYCLES):
                            workload.cycle(found[name])
    return found


@contextlib.contextmanager
def _plugins(path: Path, count: int) -> Iterator[None]:
    """A process with ``count`` plugins, which are synchronised when the block begins."""
    if not count:
        yield
        return
    command = [sys.executable, "-m", "tests.bench.nri_plugins", str(path), str(count)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.readline() != "synchronised\n":
            raise RuntimeError(f"the plugins did not connect to {path}")
        yield
        process.stdin.close()


def goals(found: Mapping[str, Samples]) -> list[Goal]:
    """What plugins may add to a cycle, with this run's values."""
    none, one, hundred = (found[name].p50("cycle") for name in _PLUGINS)
    return [
        Goal("a cycle with one plugin less one without, p50", one - none, 1.5, "ms"),
        Goal("a cycle with 100 plugins / one without, p50", hundred / none, 1.05, "x"),
    ]


def as_markdown(found: Mapping[str, Samples], results: Sequence[Goal]) -> str:
    """The NRI tables of docs/performance.md."""
    facts = report.machine()
    lines = [f"Measured with {', '.join(f'{name} {facts[name]}' for name in ('cores', 'kernel', 'python'))}.", ""]
    lines += [f"| p50 / p90, ms | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    for call in (*_CALLS, "StopPodSandbox", "RemovePodSandbox", "cycle"):
        values = [samples.values[call] for samples in found.values()]
        cells = [f"{percentile(each, 0.5):.2f} / {percentile(each, 0.9):.2f}" for each in values]
        lines.append(f"| {call} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *report.goal_table(results)]) + "\n"
