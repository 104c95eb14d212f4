"""Podkeel's goals on two quiet cores with crun, compared with one run's numbers."""

from __future__ import annotations

import math

import msgspec

from tests.bench.samples import Samples


class Memory(msgspec.Struct, frozen=True):
    """Bytes: the server's resident set with idle and with many containers; monitors and helpers per running one."""

    server_idle: int
    server_loaded: int
    monitor_per_container: float
    helpers_per_container: float
    containers: int


class StatsCost(msgspec.Struct, frozen=True):
    """``pods`` of ``containers`` each; ``busy`` is the part of one core that server and monitors take while polled.

    ``scrape_growth`` are the bytes that the server's resident set grew by with the scrapes; 0 without an address.
    """

    pods: int
    containers: int
    busy: float
    scrape_growth: int


class StreamCost(msgspec.Struct, frozen=True):
    """Bytes per second of one exec stream and of one forwarded port; resident bytes with ``sessions`` commands."""

    exec_rate: float
    forward_rate: float
    sessions: int
    resident: int


class Measured(msgspec.Struct):
    """Everything one run found out about one server."""

    name: str
    version: str
    samples: Samples
    stages: Samples
    pods_per_second: float = math.nan
    list_count: int = 0
    memory: Memory | None = None
    stats: StatsCost | None = None
    streams: StreamCost | None = None


class Goal(msgspec.Struct, frozen=True):
    """One promise: ``value`` (nan if not measured) against ``limit``."""

    name: str
    value: float
    limit: float
    unit: str
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether it is kept; a value that was not measured keeps nothing."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def goals(measured: Measured, bare: Samples) -> list[Goal]:
    """The list of promises with this run's values."""
    p50 = measured.samples.p50
    memory = measured.memory
    return [
        *(_stats_goals(measured, measured.stats) if measured.stats is not None else ()),
        *(_stream_goals(measured, measured.streams, bare) if measured.streams is not None else ()),
        Goal("RunPodSandbox p50", p50("RunPodSandbox"), 12, "ms"),
        Goal("Create+Start / bare create+start", p50("Create+Start") / bare.p50("create+start"), 1.8, "x"),
        Goal("ExecSync / bare exec", p50("ExecSync") / bare.p50("exec"), 2.0, "x"),
        Goal("Stop(0)+Remove / bare kill+delete", p50("Stop+Remove") / bare.p50("kill+delete"), 1.5, "x"),
        Goal("Stop+RemovePodSandbox p50", p50("Stop+RemovePodSandbox"), 15, "ms"),
        Goal("whole cycle of one pod p50", p50("cycle"), 75, "ms"),
        Goal("pods per second, parallel", measured.pods_per_second, 20, "/s", at_least=True),
        Goal(f"ListContainers of {measured.list_count} p50", p50("ListContainers"), 8, "ms"),
        Goal("agent resident, loaded", memory.server_loaded / 2**20 if memory else math.nan, 90, "MiB"),
        Goal("monitor per container", memory.monitor_per_container / 2**20 if memory else math.nan, 1, "MiB"),
    ]


def _stream_goals(measured: Measured, cost: StreamCost, bare: Samples) -> list[Goal]:
    return [
        Goal("exec stream / bare exec", measured.samples.p50("exec stream") / bare.p50("exec in one"), 2.0, "x"),
        Goal("out of one exec stream", cost.exec_rate / 1e6, 200, "MB/s", at_least=True),
        Goal("through one forwarded port", cost.forward_rate / 1e6, 200, "MB/s", at_least=True),
        Goal(f"agent resident with {cost.sessions} commands", cost.resident / 2**20, 200, "MiB"),
    ]


def _stats_goals(measured: Measured, cost: StatsCost) -> list[Goal]:
    p50 = measured.samples.p50
    return [
        Goal("ListContainerStats p50", p50("ListContainerStats"), 25, "ms"),
        Goal("ListPodSandboxStats p50", p50("ListPodSandboxStats"), 25, "ms"),
        Goal("scrape of the containers' metrics p50", p50("scrape"), 150, "ms"),
        Goal("memory that scrapes take", cost.scrape_growth / 2**20, 25, "MiB"),
        Goal("busy while polled", 100 * cost.busy, 1.5, "%"),
    ]
