"""Limits for the duration of single functions, on a machine without other work: ``python -m pytest tests/bench``."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from host.cgroups import discover
from runtime.specgen.builder import build
from tests.integration.metrics.own_cgroup import OwnCgroup
from tests.integration.network.conftest import Node, running_node, spare_subnet
from tests.integration.network.namespaces import request
from tests.unit.spec.requests import like_kubelets


def median(work: Callable[[], object], rounds: int) -> float:
    """Seconds of processor time of this thread. A first call, which fills caches, is not counted."""
    work()
    times = []
    for _ in range(rounds):
        begin = time.thread_time()
        work()
        times.append(time.thread_time() - begin)
    return statistics.median(times)


def test_a_spec_is_built_in_milliseconds(tmp_path: Path) -> None:
    """It takes about 1 ms. Compiling the seccomp profile each time would take 14 ms."""
    wanted = like_kubelets(tmp_path)
    assert median(lambda: build(wanted), 50) < 0.003


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_all_files_of_a_cgroup_are_read_in_microseconds() -> None:
    """It takes about 50 µs."""
    own = OwnCgroup(discover(), f"/podkeel-test-speed-{os.getpid()}")
    try:
        own.run(["sleep", "1000"])
        assert median(own.reader.read, 300) < 0.00015
    finally:
        own.reader.close()
        own.remove()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
async def test_attach_and_detach_stay_fast_with_two_hundred_pods(tmp_path: Path) -> None:
    """A pod is a few set elements, so other pods make no difference. The limit allows for some other work."""
    async with running_node(tmp_path, pod_cidrs=(f"{spare_subnet()}.0/24", f"{spare_subnet()}.0/24")) as node:
        few = await _attach_and_detach(node, "few")
        for number in range(200):
            await node.pod(f"resident{number}")
        many = await _attach_and_detach(node, "many")
    print(f"attach and detach, p50: {few * 1000:.2f} ms alone, {many * 1000:.2f} ms beside 200 pods")
    assert many < few * 1.5


async def _attach_and_detach(node: Node, name: str) -> float:
    """The median duration of connecting and disconnecting one pod, in seconds."""
    seconds = []
    for number in range(30):
        namespace = node.namespace()
        started = time.perf_counter()
        await node.network.attach(request(f"{name}{number}", str(namespace.path), []))
        await node.network.detach(f"{name}{number}")
        seconds.append(time.perf_counter() - started)
        namespace.close()
    return statistics.median(seconds)
