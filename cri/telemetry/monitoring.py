"""Metrics and health of the agent and its pods over HTTP (imported only if an address for it is configured)."""

from __future__ import annotations

import logging
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager

import grpc

from cri.config.options import DEFAULT_METRICS_ADDRESS, MetricsOptions
from cri.methods import Call
from cri.telemetry import node_metrics
from host.errors import UnavailableError
from host.listener import tls_context
from host.stages import observed_by
from metrics.agent import AgentMetrics
from metrics.catalog import CATALOG
from metrics.exposition.routes import Entries, standard_routes
from metrics.exposition.server import MetricsServer, Route
from runtime.agent import Agent

# The codes that mean a failure of the node; an alert counts them. Other codes are regular answers.
NODE_ERRORS = (
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)

_log = logging.getLogger("podkeel.monitoring")


class CallMetrics:
    """Observes every call for the agent's metrics."""

    def __init__(self, metrics: AgentMetrics) -> None:
        self._metrics = metrics
        self._methods: set[str] = set()
        for code in grpc.StatusCode:  # every series exists from the start: an alert sees no increase of a new series
            metrics.pulls.add(code.name, amount=0.0)

    @contextmanager
    def observe(self, call: Call) -> Iterator[None]:
        """Counts and times a call."""
        metrics, method = self._metrics, call.method
        if method not in self._methods:
            self._methods.add(method)
            for error in NODE_ERRORS:
                metrics.calls.add(method, error.name, amount=0.0)
        metrics.call_began(method)
        try:
            yield
        finally:
            code, seconds = call.code.name, call.seconds
            metrics.call_ended(method, code, seconds)
            if method == "PullImage":
                metrics.pulls.add(code)
                metrics.pull_seconds.observe(seconds)


class Monitoring:
    """Measures the agent, and serves /metrics, /metrics/cadvisor, /healthz and /readyz where ``serve`` says."""

    def __init__(self, agent: Agent, metrics: AgentMetrics) -> None:
        self.calls = CallMetrics(metrics)
        self._routes = _routes(metrics, agent)
        self._server: MetricsServer | None = None
        self._address = ""

    async def serve(self, options: MetricsOptions) -> None:
        """Serve as ``options`` say, and end what was served before. An empty address serves nothing.

        Raises InvalidArgumentError for an unusable certificate, UnavailableError when the address is taken, which of
        the default address is only a warning. What was served before stays then, unless it has the same address.
        """
        tls = server_tls(options)
        if options.address == self._address:
            await self.close()
        server = await self._started(options, tls) if options.address else None
        await self.close()
        self._server, self._address = server, options.address if server is not None else ""

    async def _started(self, options: MetricsOptions, tls: ssl.SSLContext | None) -> MetricsServer | None:
        host, _, port = options.address.rpartition(":")
        host = host.strip("[]")
        server = MetricsServer(self._routes, tls)
        try:
            bound = await server.start(host, int(port))
        except OSError as error:
            problem = f"metrics.address {options.address}: cannot be listened on ({error.strerror}): use another one"
            if options.address != DEFAULT_METRICS_ADDRESS:
                raise UnavailableError(problem) from error
            _log.warning("metrics: not served: %s", problem)
            return None
        scheme = "https" if options.tls_certificate else "http"
        _log.info("metrics: serving on %s://%s:%d/metrics", scheme, host, bound)
        return server

    async def close(self) -> None:
        """Serve no more."""
        server, self._server, self._address = self._server, None, ""
        if server is not None:
            await server.close()


@asynccontextmanager
async def monitoring(agent: Agent, options: MetricsOptions) -> AsyncIterator[Monitoring]:
    """Measure and serve during the block. Raises what ``Monitoring.serve`` does."""
    metrics = AgentMetrics()
    node_metrics.register(metrics, agent)
    served = Monitoring(agent, metrics)
    await served.serve(options)
    metrics.watch_loop()
    try:
        with observed_by(metrics.stage):
            yield served
    finally:
        await metrics.close()
        await served.close()


def server_tls(options: MetricsOptions) -> ssl.SSLContext | None:
    """The TLS context made from the options' files; None without files. Raises InvalidArgumentError."""
    return tls_context("metrics", options.tls_certificate, options.tls_key, options.tls_client_ca)


def _routes(metrics: AgentMetrics, agent: Agent) -> Mapping[str, Route]:
    async def entries() -> Entries:
        pods = await agent.statistics.snapshots()
        return [entry for pod in pods for entry in (pod.itself, *pod.containers.values())]

    return standard_routes(metrics, CATALOG, entries, lambda: list(node_metrics.problems(agent).values()))
