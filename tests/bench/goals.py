"""Podkeel's goals for two quiet cores with crun, compared with the values of one run."""

from __future__ import annotations

import math

import msgspec

from tests.bench.samples import Samples


class Memory(msgspec.Struct, frozen=True):
    """Bytes: the server's resident set when idle and with many containers; monitors and helpers per running one."""

    server_idle: int
    server_loaded: int
    monitor_per_container: float
    helpers_per_container: float
    containers: int


class StatsCost(msgspec.Struct, frozen=True):
    """``pods`` with ``containers`` each. ``busy`` is the share of one core that server and monitors use while polled.

    ``scrape_growth`` is the growth of the server's resident set during scrapes in bytes; 0 without an address.
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
    """All measurements of one server in one run."""

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
    """One goal: ``value`` (nan if not measured) and its ``limit``."""

    name: str
    value: float
    limit: float
    unit: str
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the goal is met. It is not met if it was not measured."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def goals(measured: Measured, bare: Samples) -> list[Goal]:
    """The goals with the values of this run."""
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
