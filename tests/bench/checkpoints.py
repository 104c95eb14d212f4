"""Measures checkpoints and restores of containers of different sizes, and how long these are frozen."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess, build_busybox, running_agent, wait_for
from tests.support.checkpoints import abilities, checkpoint, image_of, memory_of, wait_for_lines
from tests.support.pods import container_config, sandbox_config

T = TypeVar("T")

SIZES = (10, 100, 1000)  # MiB
_STANDS_STILL = ("freeze", "dump", "files", "thaw")


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost for a container with so many MiB of memory: seconds of each step, and MiB of the archive."""

    size: int
    checkpoint: float
    frozen: float
    archive: float
    image: float
    create: float
    start: float


def measure(folder: Path, sizes: Sequence[int] = SIZES) -> list[Cost]:
    """Measure with a new agent. Raises RuntimeError if crun cannot make checkpoints."""
    with running_agent(folder, build_busybox(folder)) as agent:
        why = abilities(agent).get("crun", "crun does not work here")
        if why != "able":
            raise RuntimeError(f"checkpoints cannot be made here: {why}")
        return [_measure(agent, folder, size) for size in sizes]


def _measure(agent: AgentProcess, folder: Path, size: int) -> Cost:
    memory = f"head -c {size}m /dev/zero | tail -c {size}m | while :; do sleep 1; done"
    script = f"({memory}) & while :; do echo x; sleep 0.01; done"
    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox, "crun")
    container_id = agent.client.create(sandbox_id, container_config("main", "sh", "-c", script), sandbox)
    agent.client.start(container_id)
    wait_for(lambda: memory_of(agent, container_id) > size << 20, seconds=60, what="its memory")
    archive = folder / f"{size}.tar"
    taken, _ = _timed(lambda: checkpoint(agent, container_id, archive, timeout=300))
    frozen = sum(_stages(agent, container_id).get(name, 0.0) for name in _STANDS_STILL)
    agent.client.stop_sandbox(sandbox_id)
    agent.client.remove_sandbox(sandbox_id)
    made, image = _timed(lambda: image_of(agent, archive, f"localhost/bench/checkpoint:{size}"))
    pod = sandbox_config(agent)
    pod_id = agent.client.run_sandbox(pod, "crun")
    created, restored = _timed(lambda: agent.client.create(pod_id, container_config("main", image=image), pod))
    started, _ = _timed(lambda: agent.client.start(restored))
    wait_for_lines(agent, restored)
    agent.client.stop_sandbox(pod_id)
    agent.client.remove_sandbox(pod_id)
    length = archive.stat().st_size / (1 << 20)
    archive.unlink()
    return Cost(size, taken, frozen, length, made, created, started)


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


def _stages(agent: AgentProcess, container_id: str) -> dict[str, float]:
    request = cri_pb2.ContainerStatusRequest(container_id=container_id, verbose=True)
    information = json.loads(agent.client.call("ContainerStatus", request).info["info"])
    (operation,) = [found for found in information["operations"] if found["name"] == "CheckpointContainer"]
    return {stage["name"]: stage["seconds"] for stage in operation["stages"]}


def as_text(costs: Sequence[Cost]) -> str:
    """The costs as a text table."""
    head = f"{'memory':>10} {'checkpoint':>11} {'frozen':>9} {'archive':>11} {'image':>9} {'create':>9} {'start':>9}"
    rows = [
        f"{cost.size:>6} MiB {cost.checkpoint:>9.2f} s {cost.frozen:>7.2f} s {cost.archive:>7.0f} MiB "
        f"{cost.image:>7.2f} s {cost.create:>7.2f} s {cost.start:>7.2f} s"
        for cost in costs
    ]
    return "\n".join((head, *rows))
