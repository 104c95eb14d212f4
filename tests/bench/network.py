"""The network phase: the cost of connecting pods to the built-in network, compared with CNI's bridge plugin.

It measures two Podkeels that differ only in their network. Pods have no containers. The durations of attach and detach
are those of the stages that the agents record. The calls are timed at the client.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import msgspec

from proto.runtime.v1 import cri_pb2
from scripts.build_busybox_image import busybox_image
from tests.bench import report, servers
from tests.bench.client import Client
from tests.bench.goals import Goal
from tests.bench.samples import Samples, percentile
from tests.bench.workload import Workload

_IMAGE = "localhost/bench/busybox:1"
_SAMPLES = 40
_WARM_UP = 5
_BURST = 50
_PORTS = 1000
_FIRST_PORT = 20000
_STAGE = "network"
_CALLS = ("RunPodSandbox", "StopPodSandbox", "RemovePodSandbox")


class Level(msgspec.Struct):
    """Durations in milliseconds while there are ``pods`` pods."""

    pods: int
    samples: Samples


class NetworkCost(msgspec.Struct):
    """The cost of one network: with more and more pods, in a burst, and with many host ports (nan: not measured)."""

    name: str
    levels: list[Level]
    burst_seconds: float = math.nan
    burst_version: float = math.nan
    port_milliseconds: float = math.nan


def measure(
    folder: Path, runtime: str, cidrs: Sequence[str], counts: Sequence[int], peer_most: int, *, cgroup_parent: str
) -> list[NetworkCost]:
    """Measure both networks with the ``counts`` of pods; CNI's up to ``peer_most``, as each of its pods is slow."""
    archive = folder / "busybox.tar"
    busybox_image().write_docker(archive, _IMAGE)
    bridge = f"pktn{os.getpid() % 100000}"
    settings = {"built-in": '[network]\nmode = "built-in"\n', "CNI bridge": _cni(folder / "cni", bridge, cidrs[1])}
    costs: list[NetworkCost] = []
    for (name, text), cidr in zip(settings.items(), cidrs, strict=True):
        place = folder / name.replace(" ", "-")
        place.mkdir()
        with ExitStack() as stack:
            server = servers.podkeel(place / "server", runtime, cidr, _IMAGE, archive, settings=text)
            client = stack.enter_context(server)
            workload = Workload(client, name, image=_IMAGE, handler="", cgroup_parent=cgroup_parent, logs=place)
            stack.callback(workload.close)
            cost = NetworkCost(name, [])
            costs.append(cost)
            _levels(workload, cost, [count for count in counts if name == "built-in" or count <= peer_most])
            _burst(workload, cost)
            if name == "built-in":
                cost.port_milliseconds = _many_ports(workload)
    subprocess.run(["ip", "link", "delete", bridge], check=False, stderr=subprocess.DEVNULL)
    return costs


def _cni(folder: Path, bridge: str, cidr: str) -> str:
    """Configure CNI's bridge plugin below ``folder``. Returns the agent's settings."""
    folder.mkdir()
    ipam = {"type": "host-local", "ranges": [[{"subnet": cidr}]], "dataDir": str(folder / "addresses")}
    plugin = {"type": "bridge", "bridge": bridge, "isGateway": True, "ipam": {**ipam, "routes": [{"dst": "0.0.0.0/0"}]}}
    configuration = {"cniVersion": "1.0.0", "name": "bench", "plugins": [plugin]}
    (folder / "10-bench.conflist").write_text(json.dumps(configuration))
    return f'[network]\nmode = "cni"\ncni_config_dir = "{folder}"\ncni_bin_dirs = ["/usr/lib/cni"]\n'


def _levels(workload: Workload, cost: NetworkCost, counts: Sequence[int]) -> None:
    with ExitStack() as stack:
        there = 0
        for count in counts:
            for _ in range(count - there):
                stack.enter_context(workload.pod(Samples()))
            there = count
            samples = Samples()
            for _ in range(_WARM_UP):
                _one_pod(workload, Samples())
            for _ in range(_SAMPLES):
                _one_pod(workload, samples)
            cost.levels.append(Level(count, samples))


def _one_pod(workload: Workload, samples: Samples) -> None:
    """Create and remove a pod. Adds each call, and ``attach`` and ``detach`` as timed by the agent."""
    with samples.timed("RunPodSandbox"):
        pod = workload.run_pod()
    with samples.timed("StopPodSandbox"):
        workload.client.call("StopPodSandbox", cri_pb2.StopPodSandboxRequest(pod_sandbox_id=pod))
    stages = _network_stages(workload.client, pod)
    with samples.timed("RemovePodSandbox"):
        workload.client.call("RemovePodSandbox", cri_pb2.RemovePodSandboxRequest(pod_sandbox_id=pod))
    samples.add("attach", stages["RunPodSandbox"])
    samples.add("detach", stages["StopPodSandbox"])
    samples.add("attach+detach", sum(stages.values()))


def _network_stages(client: Client, pod: str) -> dict[str, float]:
    from proto.podkeel.v1 import agent_pb2

    explained = client.call("Explain", agent_pb2.ExplainRequest(id=pod))
    return {
        operation.name: stage.seconds * 1000
        for operation in explained.operations
        for stage in operation.stages
        if stage.name == _STAGE
    }


def _burst(workload: Workload, cost: NetworkCost) -> None:
    """Create many pods at once, none of which may fail. Also measures a call without work during the burst."""
    burst, version = Samples(), Samples()
    with ThreadPoolExecutor(_BURST + 1) as pool:
        with burst.timed("burst"):
            asked = [pool.submit(workload.run_pod) for _ in range(_BURST)]
            while not all(one.done() for one in asked):
                workload.version(version, 1)
        pods = [one.result() for one in asked]
        for one in [pool.submit(workload.remove_pod, pod, Samples()) for pod in pods]:
            one.result()
    cost.burst_seconds = burst.values["burst"][0] / 1000
    cost.burst_version = version.p50("Version")


def _many_ports(workload: Workload) -> float:
    """The milliseconds that one of a thousand host ports adds to the start and removal of a pod."""
    plain, many = Samples(), Samples()
    protocols = (cri_pb2.TCP, cri_pb2.UDP)
    ports = [
        cri_pb2.PortMapping(container_port=80, host_port=_FIRST_PORT + number, protocol=protocols[number % 2])
        for number in range(_PORTS)
    ]
    for samples, mappings in ((plain, ports[:0]), (many, ports)) * 2:
        with samples.timed("pod"):
            workload.remove_pod(workload.run_pod(mappings), Samples())
    return (min(many.values["pod"]) - min(plain.values["pod"])) / _PORTS


def goals(costs: Sequence[NetworkCost]) -> list[Goal]:
    """The goals of the built-in network with the values of this run."""
    own = costs[0]
    fewest, most = own.levels[0], own.levels[-1]
    middle = next((level for level in own.levels if level.pods >= 200), most)
    return [
        Goal(f"attach+detach beside {middle.pods} pods, p50", middle.samples.p50("attach+detach"), 5, "ms"),
        Goal(
            f"attach+detach beside {most.pods} pods / beside {fewest.pods}",
            most.samples.p50("attach+detach") / fewest.samples.p50("attach+detach"),
            1.5,
            "x",
        ),
        Goal(f"RunPodSandbox beside {middle.pods} pods, p50", middle.samples.p50("RunPodSandbox"), 8, "ms"),
        Goal(f"{_BURST} pods at once", own.burst_seconds, 1, "s"),
        Goal(f"one of {_PORTS} host ports", own.port_milliseconds, 1, "ms"),
    ]


def as_markdown(costs: Sequence[NetworkCost], results: Sequence[Goal]) -> str:
    """The network tables of docs/performance.md."""
    facts = report.machine()
    names = ("cores", "kernel", "python", "load before")
    lines = [f"Measured with {', '.join(f'{name} {facts[name]}' for name in names)}.", ""]
    columns = [(cost, level) for cost in costs for level in cost.levels]
    lines += [f"| p50 / p90, ms | {' | '.join(f'{cost.name}, {level.pods} pods' for cost, level in columns)} |"]
    lines += ["|---" * (len(columns) + 1) + "|"]
    for name in ("attach", "detach", "attach+detach", *_CALLS):
        values = [level.samples.values[name] for _, level in columns]
        cells = [f"{percentile(found, 0.5):.2f} / {percentile(found, 0.9):.2f}" for found in values]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"| | {' | '.join(cost.name for cost in costs)} |", "|---" * (len(costs) + 1) + "|"]
    lines.append(f"| {_BURST} pods at once, seconds | {' | '.join(f'{cost.burst_seconds:.2f}' for cost in costs)} |")
    meanwhile = " | ".join(f"{cost.burst_version:.1f}" for cost in costs)
    lines.append(f"| Version behind them, p50, ms | {meanwhile} |")
    lines += ["", *report.goal_table(results)]
    return "\n".join(lines) + "\n"
