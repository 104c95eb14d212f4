"""Writes one run as text tables and as JSON."""

from __future__ import annotations

import math
import platform
import subprocess
from collections.abc import Sequence
from typing import Any

import msgspec

from tests.bench.goals import Goal, Measured
from tests.bench.samples import Samples, Summary, summarize

_ORDER = (
    "Version",
    "RunPodSandbox",
    "CreateContainer",
    "StartContainer",
    "Create+Start",
    "ExecSync",
    "StopContainer(0)",
    "RemoveContainer",
    "Stop+Remove",
    "StopPodSandbox",
    "RemovePodSandbox",
    "Stop+RemovePodSandbox",
    "cycle",
    "ListContainers",
    "ListContainerStats",
    "ListPodSandboxStats",
    "ListPodSandboxMetrics",
    "scrape",
    "exec stream",
)
_TOOLS = (("crun", "--version"), ("runc", "--version"), ("conmon", "--version"), ("containerd", "--version"))


def machine() -> dict[str, str]:
    """The machine that was measured: processors, kernel, versions of the tools; no names."""
    import os

    with open("/proc/cpuinfo", encoding="utf-8") as info:
        models = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    facts = {
        "cores": f"{os.cpu_count()} ({models[0] if models else platform.machine()})",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load before": f"{os.getloadavg()[0]:.2f}",
    }
    for command in _TOOLS:
        try:
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (FileNotFoundError, subprocess.CalledProcessError):
            continue
        facts[command[0]] = next((word.lstrip("v") for word in output.split() if word[:1].isdigit()), "?")
    return facts


def as_data(
    facts: dict[str, str],
    parameters: dict[str, Any],
    servers: Sequence[Measured],
    bare: Samples,
    results: Sequence[Goal],
) -> dict[str, Any]:
    """The whole run as data for JSON. Durations are in milliseconds, memory in bytes."""
    return {
        "machine": facts,
        "parameters": parameters,
        "servers": [
            {
                "name": server.name,
                "version": server.version,
                "calls": msgspec.to_builtins(server.samples.summaries()),
                "stages": msgspec.to_builtins(server.stages.summaries()),
                "pods_per_second": server.pods_per_second,
                "memory": msgspec.to_builtins(server.memory),
                "stats": msgspec.to_builtins(server.stats),
                "streams": msgspec.to_builtins(server.streams),
            }
            for server in servers
        ],
        "bare": msgspec.to_builtins(bare.summaries()),
        "goals": [{**msgspec.to_builtins(goal), "met": goal.met} for goal in results],
    }


def as_text(facts: dict[str, str], servers: Sequence[Measured], bare: Samples, results: Sequence[Goal]) -> str:
    """The text tables."""
    lines = ["  ".join(f"{name} {value}" for name, value in facts.items()), ""]
    for server in servers:
        lines += [f"{server.name} ({server.version}), ms", *_calls(server.samples.summaries(), _ORDER)]
        if server.stages.values:
            lines += ["  stages inside, ms", *_calls(server.stages.summaries(), ())]
        lines.append(f"  pods per second in parallel: {server.pods_per_second:.1f}")
        if memory := server.memory:
            lines.append(
                f"  resident: {_mib(memory.server_idle)} idle, {_mib(memory.server_loaded)} loaded; PSS per running "
                f"container: {_mib(memory.monitor_per_container)} monitor, {_mib(memory.helpers_per_container)} "
                f"helpers ({memory.containers} containers)"
            )
        if cost := server.stats:
            lines.append(
                f"  polled with {cost.pods} pods of {cost.containers} containers: {cost.busy:.2%} of a core; scrapes "
                f"take {_mib(cost.scrape_growth)}"
            )
        if streams := server.streams:
            rates = f"{streams.exec_rate / 1e6:.0f} MB/s out of a command, {streams.forward_rate / 1e6:.0f} through a"
            lines.append(f"  {rates} port; resident {_mib(streams.resident)} with {streams.sessions} commands")
        lines.append("")
    if bare.values:
        lines += ["bare OCI runtime, ms", *_calls(bare.summaries(), ()), ""]
    if len(servers) > 1:
        lines += _comparison(servers[0], servers[1])
    lines.append(f"goals of {servers[0].name}")
    for goal in results:
        verdict = "not measured" if math.isnan(goal.value) else "pass" if goal.met else "FAIL"
        sign = ">=" if goal.at_least else "<="
        lines.append(f"  {goal.name:<38} {goal.value:>8.2f} {sign} {goal.limit:g} {goal.unit:<4} {verdict}")
    return "\n".join(lines)


def as_markdown(facts: dict[str, str], servers: Sequence[Measured], bare: Samples, results: Sequence[Goal]) -> str:
    """The tables of docs/performance.md."""
    lines = [f"Measured with {', '.join(f'{name} {value}' for name, value in facts.items())}.", ""]
    lines += [f"| p50 / p90 / p99, ms | {' | '.join(server.version for server in servers)} | bare |"]
    lines += ["|---" * (len(servers) + 2) + "|"]
    clients = [name for name in servers[0].samples.values if name not in _ORDER]
    for name in (*_ORDER, *sorted(clients, key=lambda n: _ORDER.index(n.rpartition(" x")[0]))):
        cells = [_cell(server.samples, name) for server in servers]
        lines.append(f"| {name} | {' | '.join(cells)} | {_cell(bare, _BARE.get(name, ''))} |")
    lines += ["", f"| | {' | '.join(server.version for server in servers)} |", "|---" * (len(servers) + 1) + "|"]
    lines.append(f"| pods per second, parallel | {' | '.join(f'{s.pods_per_second:.1f}' for s in servers)} |")
    memories = [server.memory for server in servers if server.memory is not None]
    if len(memories) == len(servers):
        lines.append(f"| resident, idle | {' | '.join(_mib(m.server_idle) for m in memories)} |")
        lines.append(f"| resident, loaded | {' | '.join(_mib(m.server_loaded) for m in memories)} |")
        lines.append(f"| monitor per container | {' | '.join(_mib(m.monitor_per_container) for m in memories)} |")
        lines.append(f"| helpers per container | {' | '.join(_mib(m.helpers_per_container) for m in memories)} |")
    costs = [server.stats for server in servers if server.stats is not None]
    if len(costs) == len(servers):
        lines.append(f"| busy while polled | {' | '.join(f'{cost.busy:.2%}' for cost in costs)} |")
    return "\n".join([*lines, "", *goal_table(results)]) + "\n"


def goal_table(results: Sequence[Goal]) -> list[str]:
    """The lines of a table of goals."""
    lines = ["| goal | measured | limit | |", "|---|---|---|---|"]
    for goal in results:
        limit = f"{'at least' if goal.at_least else 'at most'} {goal.limit:g} {goal.unit}"
        lines.append(f"| {goal.name} | {goal.value:.2f} | {limit} | {'met' if goal.met else 'missed'} |")
    return lines


# The bare runtime's value that each call is compared with.
_BARE = {
    "CreateContainer": "create",
    "StartContainer": "start",
    "Create+Start": "create+start",
    "ExecSync": "exec",
    "exec stream": "exec in one",
    "StopContainer(0)": "kill",
    "RemoveContainer": "delete",
    "Stop+Remove": "kill+delete",
}


def _cell(samples: Samples, name: str) -> str:
    if name not in samples.values:
        return ""
    one = summarize(samples.values[name])
    return f"{one.p50:.1f} / {one.p90:.1f} / {one.p99:.1f}"


def _calls(summaries: dict[str, Summary], order: Sequence[str]) -> list[str]:
    names = [name for name in order if name in summaries] + [name for name in summaries if name not in order]
    lines = [f"  {'':<28} {'n':>5} {'p50':>8} {'p90':>8} {'p99':>8}"]
    for name in names:
        one = summaries[name]
        lines.append(f"  {name:<28} {one.count:>5} {one.p50:>8.2f} {one.p90:>8.2f} {one.p99:>8.2f}")
    return lines


def _comparison(server: Measured, peer: Measured) -> list[str]:
    lines = [f"{peer.name} / {server.name} (p50, how many times longer the peer takes)"]
    for name in _ORDER:
        if name in server.samples.values and name in peer.samples.values:
            lines.append(f"  {name:<28} {peer.samples.p50(name) / server.samples.p50(name):>8.2f}")
    lines.append(f"  {'pods per second (inverse)':<28} {server.pods_per_second / peer.pods_per_second:>8.2f}")
    return [*lines, ""]


def _mib(count: float) -> str:
    return f"{count / 2**20:.2f} MiB"
