"""The paths of the metrics server: metrics of the agent and of containers, liveness and readiness."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from host.concurrency.threads import in_stats_thread
from metrics.agent import AgentMetrics
from metrics.exposition.prometheus import AgentPage, Page, containers_page, gather
from metrics.exposition.server import NotReady, Route
from metrics.samples import Labels, Metric, Snapshot

Entries = Sequence[tuple[Labels, Snapshot]]


def standard_routes(
    agent: AgentMetrics,
    metrics: Sequence[Metric],
    snapshots: Callable[[], Awaitable[Entries]],
    problems: Callable[[], Sequence[str]],
) -> dict[str, Route]:
    """The routes of the metrics server.

    ``snapshots`` reads all containers and pods now. ``problems`` returns sentences about what keeps the node from
    running pods; empty if it is ready. Pages are made in a thread, so that the loop can answer other calls.
    """
    page = AgentPage()
    # One page of each kind at a time: many or slow requests must not take all threads from other calls.
    making_own, making_containers = asyncio.Lock(), asyncio.Lock()

    async def own(accept: str) -> Page:
        async with making_own:
            return await in_stats_thread(page.render, gather(agent.instruments), accept)

    async def containers(accept: str) -> Page:
        async with making_containers:
            entries = await snapshots()
            return await in_stats_thread(containers_page, metrics, entries, accept)

    async def healthy(accept: str) -> Page:
        return Page("text/plain; charset=utf-8", b"ok\n")

    async def ready(accept: str) -> Page:
        if found := problems():
            raise NotReady("\n".join(found))
        return Page("text/plain; charset=utf-8", b"ok\n")

    return {"/metrics": own, "/metrics/cadvisor": containers, "/healthz": healthy, "/readyz": ready}
