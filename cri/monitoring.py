"""What the agent tells of itself and its pods over HTTP (imported only where an address for that is configured)."""

from __future__ import annotations

import logging
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager

import grpc

from cri.options import MetricsOptions
from cri.version import VERSION
from host.errors import InvalidArgumentError, UnavailableError
from host.stages import observed_by
from metrics.agent import AgentMetrics
from metrics.catalog import CATALOG
from metrics.routes import Entries, standard_routes
from metrics.server import MetricsServer, Route
from runtime.agent import Agent
from runtime.container import Container
from runtime.sandbox import Sandbox

_log = logging.getLogger("podkeel.monitoring")

Rows = list[tuple[tuple[str, ...], float]]


class CallMetrics:
    """Observes every call for the agent's metrics."""

    def __init__(self, metrics: AgentMetrics) -> None:
        self._metrics = metrics

    def began(self, method: str) -> None:
        """A call begins."""
        self._metrics.call_began(method)

    def ended(self, method: str, code: grpc.StatusCode, seconds: float) -> None:
        """A call ends."""
        self._metrics.call_ended(method, code.name, seconds)
        if method == "PullImage":
            self._metrics.pulls.add(code.name)
            self._metrics.pull_seconds.observe(seconds)


@asynccontextmanager
async def monitoring(agent: Agent, options: MetricsOptions) -> AsyncIterator[CallMetrics]:
    """Measure, and serve /metrics, /metrics/cadvisor, /healthz and /readyz during the block.

    Raises InvalidArgumentError for an unusable certificate, UnavailableError when the address is taken.
    """
    metrics = AgentMetrics()
    _compute(metrics, agent)
    host, _, port = options.address.rpartition(":")
    host = host.strip("[]")
    server = MetricsServer(_routes(metrics, agent), _tls(options))
    try:
        bound = await server.start(host, int(port))
    except OSError as error:
        raise UnavailableError(
            f"metrics.address {options.address}: cannot be listened on ({error.strerror}): use another one"
        ) from error
    _log.info("serving metrics on %s://%s:%d/metrics", "https" if options.tls_certificate else "http", host, bound)
    metrics.watch_loop()
    try:
        with observed_by(metrics.stage):
            yield CallMetrics(metrics)
    finally:
        await metrics.close()
        await server.close()


def _tls(options: MetricsOptions) -> ssl.SSLContext | None:
    if not options.tls_certificate and not options.tls_key:
        return None
    if not options.tls_certificate or not options.tls_key:
        raise InvalidArgumentError("metrics: tls_certificate and tls_key belong together: give both, or neither")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(options.tls_certificate, options.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise InvalidArgumentError(
            f"metrics: certificate {options.tls_certificate} with key {options.tls_key} cannot be used: {error}"
        ) from error
    return context


def _routes(metrics: AgentMetrics, agent: Agent) -> Mapping[str, Route]:
    async def entries() -> Entries:
        pods = await agent.statistics.snapshots()
        return [entry for pod in pods for entry in (pod.itself, *pod.containers.values())]

    return standard_routes(metrics, CATALOG, entries, lambda: _problems(agent))


def _problems(agent: Agent) -> list[str]:
    """What keeps the node from taking pods."""
    handlers, network = agent.node.handlers, agent.node.network.condition()
    problems = [] if handlers.default is not None else ["no runtime handler works on this node"]
    return problems if network.ready else [*problems, f"network: {network.message}"]


def _compute(metrics: AgentMetrics, agent: Agent) -> None:
    """Register the numbers that others keep, to be read at each scrape."""
    node = agent.node

    def gauge(name: str, text: str, read: Callable[[], float]) -> None:
        metrics.compute(name, text, (), lambda: [((), read())])

    def counter(name: str, text: str, read: Callable[[], float]) -> None:
        metrics.compute(name, text, (), lambda: [((), read())], counter=True)

    metrics.compute("podkeel_build_info", "The agent's version.", ("version",), lambda: [((VERSION,), 1.0)])
    metrics.compute("podkeel_pods", "Pods by state.", ("state",), lambda: _states(node.sandboxes))
    metrics.compute("podkeel_containers", "Containers by state.", ("state",), lambda: _states(node.containers))
    gauge("podkeel_images", "Images on the node.", lambda: len(node.images.images()))
    counter("podkeel_image_pull_bytes_total", "Bytes of layers from registries.", lambda: node.images.fetched_bytes)
    gauge("podkeel_event_subscribers", "Clients that listen to events.", lambda: node.events.subscribers)
    text = "Event subscribers closed because they did not read."
    counter("podkeel_event_subscribers_dropped_total", text, lambda: node.events.dropped)
    counter("podkeel_store_commits_total", "Commits of the store.", lambda: node.database.commits)
    text = "What monitors and OCI runtimes failed at."
    labels = ("program", "action")
    metrics.compute("podkeel_program_failures_total", text, labels, node.failures.items, counter=True)
    text = "Differences between store and node that were repaired at start."
    findings = agent.recovery.findings
    metrics.compute(
        "podkeel_recovery_findings_total",
        text,
        ("kind",),
        lambda: [((kind,), float(count)) for kind, count in findings.items()],
        counter=True,
    )


def _states(objects: Iterable[Sandbox] | Iterable[Container]) -> Rows:
    counted = Counter(str(item.record.state) for item in objects)
    return [((state,), float(count)) for state, count in counted.items()]
