"""Metrics whose values other rooms have; they are read at each scrape."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from cri.version import VERSION
from metrics.agent import AgentMetrics
from runtime.agent import Agent
from runtime.state.container import Container, ContainerState
from runtime.state.sandbox import Sandbox, SandboxState

Rows = list[tuple[tuple[str, ...], float]]

_NS = 1e-9
_CONTAINER_LABELS = ("namespace", "pod", "container")


def register(metrics: AgentMetrics, agent: Agent) -> None:
    """Add them to ``metrics``. Every series exists from the start, since an alert sees no increase of a new one."""
    metrics.compute("podkeel_build_info", "The agent's version.", ("version",), lambda: [((VERSION,), 1.0)])
    text = "1 where this condition of the node holds, 0 where it keeps pods from starting."
    metrics.compute("podkeel_ready", text, ("condition",), lambda: _conditions(agent))
    _register_counts(metrics, agent)
    _register_plugins(metrics, agent)
    _register_containers(metrics, agent)
    _register_disk(metrics, agent)


def problems(agent: Agent) -> dict[str, str]:
    """Why the node cannot run pods: a sentence for each condition that is not ready (``runtime``, ``network``)."""
    found = {} if agent.handlers.default is not None else {"runtime": "no runtime handler works on this node"}
    network = agent.network.condition()
    return found if network.ready else {**found, "network": f"network: {network.message}"}


def _conditions(agent: Agent) -> Rows:
    wrong = problems(agent)
    return [((condition,), float(condition not in wrong)) for condition in ("runtime", "network")]


def _register_counts(metrics: AgentMetrics, agent: Agent) -> None:
    def counter(name: str, text: str, read: Callable[[], float]) -> None:
        metrics.compute(name, text, (), lambda: [((), read())], counter=True)

    puller = agent.images.puller
    counter("podkeel_image_pull_bytes_total", "Bytes of layers from registries.", lambda: puller.fetched_bytes)
    text = "Event subscribers closed because they did not read."
    counter("podkeel_event_subscribers_dropped_total", text, lambda: agent.state.events.dropped)
    counter("podkeel_store_commits_total", "Commits of the store.", lambda: agent.database.commits)
    text = "Clients that listen to events."
    metrics.compute("podkeel_event_subscribers", text, (), lambda: [((), agent.state.events.subscribers)])
    text = "What monitors and OCI runtimes failed at; run program: the container's cannot be executed."
    labels = ("program", "action")
    metrics.compute("podkeel_program_failures_total", text, labels, lambda: _failures(agent), counter=True)
    text = "Differences between store and node that were repaired at start."
    findings = agent.audit.findings
    metrics.compute(
        "podkeel_recovery_findings_total",
        text,
        ("kind",),
        lambda: [((kind,), float(count)) for kind, count in findings.items()],
        counter=True,
    )


def _register_plugins(metrics: AgentMetrics, agent: Agent) -> None:
    labels = ("plugin", "event")

    def counter(name: str, text: str, place: int) -> None:
        def read() -> Rows:
            return [(row[0], float(row[1:][place])) for row in agent.hooks.calls()]

        metrics.compute(f"podkeel_nri_{name}_total", text, labels, read, counter=True)

    counter("calls", "Calls of plugins of the node (NRI).", 0)
    counter("call_seconds", "Seconds that calls of plugins of the node took.", 1)
    counter("call_errors", "Calls of plugins of the node that failed, or that they refused.", 2)


def _register_containers(metrics: AgentMetrics, agent: Agent) -> None:
    text = "Pods by state."
    metrics.compute("podkeel_pods", text, ("state",), lambda: _states(SandboxState, agent.state.sandboxes))
    text = "Containers by state."
    metrics.compute("podkeel_containers", text, ("state",), lambda: _states(ContainerState, agent.state.containers))
    text = "How often clients made a container again: the attempt of its latest one, until that is removed."
    metrics.compute(
        "podkeel_container_restarts_total",
        text,
        _CONTAINER_LABELS,
        lambda: _restarts(agent.state.containers),
        counter=True,
    )
    text = "When a container last ended for this reason, in seconds since the epoch, until it is removed."
    labels = (*_CONTAINER_LABELS, "reason")
    metrics.compute("podkeel_container_exited_timestamp_seconds", text, labels, lambda: _exits(agent.state.containers))


def _register_disk(metrics: AgentMetrics, agent: Agent) -> None:
    def used() -> Rows:  # project quotas may have to be read from the disk
        images, containers = agent.images.store.filesystem_usage(), agent.images.snapshots.filesystem_usage()
        return [(("images",), images.used_bytes), (("containers",), containers.used_bytes)]

    text = "What images and containers' writable layers take on disk."
    metrics.compute("podkeel_disk_used_bytes", text, ("kind",), used, blocks=True)
    metrics.compute("podkeel_images", "Images on the node.", (), lambda: [((), len(agent.images.store.images()))])

    def filesystems(value: Callable[[os.statvfs_result], int]) -> Callable[[], Rows]:
        folders: dict[str, Path] = {"data": agent.layout.data, "run": agent.layout.run}
        return lambda: [((name,), value(os.statvfs(folder))) for name, folder in folders.items()]

    where = "the file system of this folder of the agent"
    for name, text, value in (
        ("size_bytes", f"Size of {where}.", lambda s: s.f_blocks * s.f_frsize),
        ("available_bytes", f"What is left to use of {where}.", lambda s: s.f_bavail * s.f_frsize),
        ("files", f"Inodes of {where}; 0: it makes them as needed.", lambda s: s.f_files),
        ("files_free", f"Free inodes of {where}.", lambda s: s.f_ffree),
    ):
        metrics.compute(f"podkeel_filesystem_{name}", text, ("folder",), filesystems(value), blocks=True)


def _failures(agent: Agent) -> Rows:
    programs = (runtime.name for runtime in agent.handlers.working())
    known = [*itertools.product(programs, ("create", "run program", "start", "delete")), ("conmon", "monitor")]
    return [
        (labels, float(count)) for labels, count in (dict.fromkeys(known, 0) | agent.handlers.failed_actions).items()
    ]


def _states(kinds: type[SandboxState] | type[ContainerState], objects: Iterable[Sandbox] | Iterable[Container]) -> Rows:
    counted = Counter(item.record.state for item in objects)
    return [((str(state),), float(counted[state])) for state in kinds]


def _restarts(containers: Iterable[Container]) -> Rows:
    attempts: dict[tuple[str, ...], float] = {}
    for container in containers:
        labels = _container_labels(container)
        attempts[labels] = max(attempts.get(labels, 0.0), container.config.metadata.attempt)
    return list(attempts.items())


def _exits(containers: Iterable[Container]) -> Rows:
    latest: dict[tuple[str, ...], float] = {}
    for container in containers:
        record = container.record
        if record.state is ContainerState.EXITED:
            labels = (*_container_labels(container), record.reason)
            latest[labels] = max(latest.get(labels, 0.0), record.finished_at * _NS)
    return list(latest.items())


def _container_labels(container: Container) -> tuple[str, str, str]:
    pod = container.sandbox.config.metadata
    return (pod.namespace, pod.name, container.config.metadata.name)
