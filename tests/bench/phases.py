"""The phases of a run. The servers take turns, so that a change of the machine's speed affects all equally."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from proto.runtime.v1 import cri_pb2
from tests.bench import processes
from tests.bench.bare import BareRuntime
from tests.bench.goals import Measured, Memory
from tests.bench.samples import Samples
from tests.bench.workload import Workload

WARM_UP = 3
_LIST_PODS = 6
_LIST_CALLS = 100


class Target:
    """A server that is measured."""

    def __init__(self, workload: Workload) -> None:
        version = workload.client.call("Version", cri_pb2.VersionRequest(version="v1"))
        self.workload = workload
        self.measured = Measured(
            workload.name, f"{version.runtime_name} {version.runtime_version}", Samples(), Samples()
        )

    @property
    def samples(self) -> Samples:
        """The durations of this server."""
        return self.measured.samples


def one_client(targets: Sequence[Target], bare: BareRuntime | None, bare_samples: Samples, pods: int) -> None:
    """Whole pod cycles one after the other. The servers and the bare runtime take turns in changing order."""
    turns: list[tuple[Callable[[Samples], None], Samples]] = [(t.workload.cycle, t.samples) for t in targets]
    if bare is not None:
        turns.append((bare.cycle, bare_samples))
        bare.version(bare_samples, 20)
    for cycle, _ in turns:
        for _ in range(WARM_UP):
            cycle(Samples())
    for number in range(pods):
        first = number % len(turns)
        for cycle, samples in turns[first:] + turns[:first]:
            cycle(samples)
        for target in targets:
            target.workload.version(target.samples, 5)
        processes.reap_adopted_children()


def stages(target: Target, pods: int) -> None:
    """The stages of Podkeel's operations, as it recorded them for each pod. They are not counted as calls."""
    from proto.podkeel.v1 import agent_pb2

    workload = target.workload
    for _ in range(pods):
        with workload.pod(Samples()) as (pod, config):
            container = workload.create(pod, config, Samples())
            workload.start(container, Samples())
            workload.stop(container, Samples())
            explained = workload.client.call("Explain", agent_pb2.ExplainRequest(id=pod))
            for operation in explained.operations:
                for stage in operation.stages:
                    target.measured.stages.add(f"{operation.name}.{stage.name}", stage.seconds * 1000)
            workload.remove(container, Samples())


def in_parallel(targets: Sequence[Target], pods: int, clients: int, rounds: int = 3) -> None:
    """Cycles by many clients at once. Each call is recorded by name and number of clients, like ``cycle x10``."""
    speeds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for target in targets:
            samples = Samples()
            speeds.setdefault(target.workload.name, []).append(
                target.workload.parallel(samples, max(pods // rounds, clients), clients)
            )
            for name, values in samples.values.items():
                target.samples.values[f"{name} x{clients}"] += values
            processes.reap_adopted_children()
    for target in targets:
        mine = speeds[target.workload.name]
        target.measured.pods_per_second = sum(mine) / len(mine)


def many_containers(target: Target, containers: int, running: int) -> None:
    """ListContainers with ``containers`` containers, then the memory of the server and of ``running`` started ones."""
    idle = _resident(target)
    with contextlib.ExitStack() as stack:
        made = _make(target, stack, containers)
        target.measured.list_count = containers
        request = cri_pb2.ListContainersRequest()
        for _ in range(_LIST_CALLS):
            with target.samples.timed("ListContainers"):
                listed = target.workload.client.call("ListContainers", request)
        if len(listed.containers) < containers:
            raise RuntimeError(f"{target.workload.name} lists {len(listed.containers)} containers of {containers}")
        loaded = _resident(target)
        for container in made:
            target.workload.client.call("RemoveContainer", cri_pb2.RemoveContainerRequest(container_id=container))
    with contextlib.ExitStack() as stack:
        monitors, helpers = _running_memory(target, stack, running)
    target.measured.memory = Memory(idle, loaded, monitors / running, helpers / running, running)
    processes.reap_adopted_children()


def _make(target: Target, stack: contextlib.ExitStack, containers: int) -> list[str]:
    pods = [stack.enter_context(target.workload.pod(Samples())) for _ in range(_LIST_PODS)]

    def create(number: int) -> str:
        return target.workload.create(*pods[number % _LIST_PODS], Samples())

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(create, range(containers)))


def _running_memory(target: Target, stack: contextlib.ExitStack, running: int) -> tuple[int, int]:
    """PSS of the monitors of ``running`` containers, one in each pod, and of the monitors' other children."""
    containers = set()
    for _ in range(running):
        pod, config = stack.enter_context(target.workload.pod(Samples()))
        container = target.workload.create(pod, config, Samples())
        target.workload.start(container, Samples())
        containers.add(container)
    inits = set(processes.container_inits(containers).values())
    monitors = {processes.parent(init) for init in inits} - {1}
    helpers = {child for monitor in monitors for child in processes.children(monitor)} - inits
    measured = sum(map(processes.proportional_bytes, monitors)), sum(map(processes.proportional_bytes, helpers))
    for container in containers:
        target.workload.remove(container, Samples())
    return measured


def _resident(target: Target) -> int:
    pid = target.workload.client.server_pid()
    return processes.resident_bytes(pid) if pid is not None else 0
