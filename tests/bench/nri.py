"""The NRI phase: what plugins of the node add to the duration of a pod's whole cycle.

It measures one Podkeel, and a containerd if selected. Between rounds of cycles it changes the plugins: none, one that
subscribes to every event, and a hundred that subscribe to an event that never occurs. The result includes the time that
the plugin takes for an answer.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from scripts.build_busybox_image import busybox_image
from tests.bench import report, servers
from tests.bench.goals import Goal
from tests.bench.samples import Samples, percentile
from tests.bench.workload import Workload

PODKEEL, CONTAINERD = "podkeel", "containerd"
Found = dict[str, Samples]
"""Durations at one server by the plugins that were there."""

_IMAGE = "localhost/bench/busybox:1"
_CYCLES = 5  # per round
_CALLS = ("RunPodSandbox", "CreateContainer", "StartContainer", "StopContainer(0)", "RemoveContainer")
_NONE, _ONE, _HUNDRED = "no plugin", "one, all events", "100, no events"
_PLUGINS = {_NONE: 0, _ONE: 1, _HUNDRED: 100}


def measure(
    folder: Path, runtimes: tuple[str, str], cidrs: tuple[str, str], rounds: int, *, cgroup_parent: str, peer: bool
) -> dict[str, Found]:
    """Durations of calls and cycles by server and by plugins. The combinations take turns in changing order.

    ``peer`` adds containerd, without the hundred plugins. Runtimes and ranges are those of Podkeel and of the peer.
    """
    archive, sockets = folder / "busybox.tar", {name: folder / f"{name}-nri.sock" for name in (PODKEEL, CONTAINERD)}
    busybox_image().write_docker(archive, _IMAGE)
    settings = f'[nri]\nsocket = "{sockets[PODKEEL]}"\nplugin_dir = "{folder}/plugins"\n'
    found: dict[str, Found] = {}
    workloads: dict[str, Workload] = {}
    with contextlib.ExitStack() as stack:
        own = servers.podkeel(folder / "podkeel", runtimes[0], cidrs[0], _IMAGE, archive, settings=settings)
        clients = {PODKEEL: stack.enter_context(own)}
        if peer:
            other = servers.containerd(folder / "containerd", runtimes[1], cidrs[1], archive, nri=sockets[CONTAINERD])
            clients[CONTAINERD] = stack.enter_context(other)
        logs = folder / "logs"
        logs.mkdir()
        for server, client in clients.items():
            workload = Workload(client, server, image=_IMAGE, handler="", cgroup_parent=cgroup_parent, logs=logs)
            workloads[server] = stack.enter_context(contextlib.closing(workload))
            found[server] = {name: Samples() for name in _PLUGINS if server == PODKEEL or name != _HUNDRED}
        turns = [(server, name) for server, plugged in found.items() for name in plugged]
        for _ in range(rounds):
            for server, name in random.sample(turns, len(turns)):
                with _plugins(sockets[server], _PLUGINS[name]):
                    workloads[server].cycle(Samples())  # the first one also cleans up after the last plugins
                    for _ in range(_CYCLES):
                        workloads[server].cycle(found[server][name])
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


def added(found: Found, name: str) -> float:
    """What plugins add to a cycle, in milliseconds: the median over all rounds of the difference of medians."""
    none, some = (found[each].values["cycle"] for each in (_NONE, name))
    rounds = range(0, len(none), _CYCLES)
    return statistics.median(
        statistics.median(some[at : at + _CYCLES]) - statistics.median(none[at : at + _CYCLES]) for at in rounds
    )


def goals(found: Mapping[str, Found]) -> list[Goal]:
    """The goals for plugins with the values of this run."""
    own = found[PODKEEL]
    none = own[_NONE].p50("cycle")
    results = [
        Goal("one plugin adds to a cycle", added(own, _ONE), 1.5, "ms"),
        Goal("a cycle with 100 plugins / one without", (none + added(own, _HUNDRED)) / none, 1.05, "x"),
    ]
    if CONTAINERD in found:
        ratio = added(own, _ONE) / added(found[CONTAINERD], _ONE)
        results.append(Goal("what one plugin adds / what it adds to containerd", ratio, 1 / 3, "x"))
    return results


def as_markdown(found: Mapping[str, Found], results: Sequence[Goal]) -> str:
    """The NRI tables of docs/performance.md."""
    facts = report.machine()
    lines = [f"Measured with {', '.join(f'{name} {facts[name]}' for name in ('cores', 'kernel', 'python'))}.", ""]
    columns = {f"{server}, {name}": samples for server, plugged in found.items() for name, samples in plugged.items()}
    lines += [f"| p50 / p90, ms | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for call in (*_CALLS, "StopPodSandbox", "RemovePodSandbox", "cycle"):
        values = [samples.values[call] for samples in columns.values()]
        cells = [f"{percentile(each, 0.5):.2f} / {percentile(each, 0.9):.2f}" for each in values]
        lines.append(f"| {call} | {' | '.join(cells)} |")
    for server, plugged in found.items():
        lines += ["", f"One plugin adds {added(plugged, _ONE):.2f} ms to a cycle of {server}."]
    return "\n".join([*lines, "", *report.goal_table(results)]) + "\n"
