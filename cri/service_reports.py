"""Reports to systemd (sd_notify(3)): that the event loop runs, and the agent's status."""

from __future__ import annotations

import asyncio

from host.systemd import ServiceManager
from runtime.agent import Agent
from runtime.state.container import ContainerState

_STATUS_SECONDS = 5.0
_START_SECONDS = 60.0  # how long systemd waits for the next report during a start


async def report_start(manager: ServiceManager) -> None:
    """Report that the start continues, for as long as this runs: recovery of a full node may take minutes."""
    while True:
        manager.starting(_START_SECONDS)
        await asyncio.sleep(_START_SECONDS / 4)


async def report_work(manager: ServiceManager, agent: Agent) -> None:
    """Report the status and that the event loop runs, until cancelled.

    If the loop hangs, no report is sent, and systemd restarts the service after WatchdogSec=.
    """
    seconds = min(_STATUS_SECONDS, manager.watchdog_seconds / 3 or _STATUS_SECONDS)
    while True:
        if manager.watchdog_seconds:
            manager.alive()
        manager.status(status_line(agent))
        await asyncio.sleep(seconds)


def status_line(agent: Agent) -> str:
    """The status in one line: numbers of pods, containers and pulls, and what the agent waits for."""
    pods = sum(1 for _ in agent.state.visible_sandboxes())
    running = sum(item.record.state is ContainerState.RUNNING for item in agent.state.visible_containers())
    parts = [f"pods: {pods}", f"running containers: {running}", f"pulls: {len(agent.images.puller.pulls())}"]
    if agent.handlers.default is None:
        parts.append("no runtime handler works: see `podkeel check`")
    network = agent.network.condition()
    if not network.ready:
        parts.append(f"waits for the network: {network.message}")
    return ", ".join(parts).replace("\n", " ")
