"""The cost of statistics: kubelet's calls, Prometheus's scrapes, and constant polling."""

from __future__ import annotations

import contextlib
import os
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

from proto.runtime.v1 import cri_pb2
from tests.bench import processes
from tests.bench.goals import StatsCost
from tests.bench.phases import Target
from tests.bench.samples import Samples

CALLS = 30
SCRAPES = 10
_STATS_EVERY = 10


def measure(target: Target, pods: int, containers: int, seconds: int) -> StatsCost:
    """Measure the lists and the scrape with ``pods`` running, then poll as kubelet does for ``seconds``."""
    with contextlib.ExitStack() as stack:
        ids = _start(target, stack, pods, containers)
        _time_calls(target)
        growth = _time_scrapes(target)
        busy = _poll(target, set(ids), seconds)
    processes.reap_adopted_children()
    return StatsCost(pods, containers, busy, growth)


def _start(target: Target, stack: contextlib.ExitStack, pods: int, containers: int) -> list[str]:
    workload = target.workload

    def start(made: tuple[str, cri_pb2.PodSandboxConfig]) -> list[str]:
        ids = [workload.create(*made, Samples()) for _ in range(containers)]
        for container in ids:
            workload.start(container, Samples())
        return ids

    made = [stack.enter_context(workload.pod(Samples(), own_cgroup=True)) for _ in range(pods)]
    with ThreadPoolExecutor(4) as pool:
        return [container for ids in pool.map(start, made) for container in ids]


def _time_calls(target: Target) -> None:
    client = target.workload.client
    requests = {
        "ListContainerStats": cri_pb2.ListContainerStatsRequest(),
        "ListPodSandboxStats": cri_pb2.ListPodSandboxStatsRequest(),
        "ListPodSandboxMetrics": cri_pb2.ListPodSandboxMetricsRequest(),
    }
    for name in [name for name in requests if client.answers(name, requests[name])]:
        for _ in range(CALLS):
            with target.samples.timed(name):
                client.call(name, requests[name])


def _time_scrapes(target: Target) -> int:
    client = target.workload.client
    pid = client.server_pid()
    if not client.metrics_url or pid is None:
        return 0
    before = processes.resident_bytes(pid)
    for _ in range(SCRAPES):
        with target.samples.timed("scrape"), urllib.request.urlopen(f"{client.metrics_url}/cadvisor") as answer:
            answer.read()
    return processes.resident_bytes(pid) - before


def _poll(target: Target, containers: set[str], seconds: int) -> float:
    """Call both lists each second and the pods' statistics every ten. Returns processor seconds per second."""
    client = target.workload.client
    pid = client.server_pid()
    if pid is None:
        return float("nan")
    inits = processes.container_inits(containers).values()
    watched = {pid, *(processes.parent(init) for init in inits)} - {1, os.getpid()}
    stats = client.answers("ListPodSandboxStats", cri_pb2.ListPodSandboxStatsRequest())
    begin, used = time.monotonic(), sum(map(processes.processor_seconds, watched))
    for second in range(seconds):
        client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest())
        client.call("ListContainers", cri_pb2.ListContainersRequest())
        if stats and second % _STATS_EVERY == 0:
            client.call("ListPodSandboxStats", cri_pb2.ListPodSandboxStatsRequest())
        time.sleep(max(0.0, begin + second + 1 - time.monotonic()))
    return (sum(map(processes.processor_seconds, watched)) - used) / (time.monotonic() - begin)
