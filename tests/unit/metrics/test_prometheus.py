"""Text for Prometheus, read back by its own parsers."""

from __future__ import annotations

import asyncio
import errno
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from prometheus_client import parser as text_parser
from prometheus_client.openmetrics import parser as openmetrics_parser

from metrics.agent import AgentMetrics
from metrics.catalog import CATALOG
from metrics.exposition.prometheus import OPEN_METRICS, TEXT, AgentPage, containers_page, gather, wants_open_metrics
from metrics.exposition.routes import Entries, standard_routes
from metrics.instruments import Histogram
from metrics.samples import Labels
from tests.unit.metrics.test_catalog import FULL, LABELS, samples

parse_open_metrics: Callable[[str], Iterable[Any]] = openmetrics_parser.text_string_to_metric_families
parse_text: Callable[[str], Iterable[Any]] = text_parser.text_string_to_metric_families
ACCEPT = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;q=0.5"
ODD = Labels(container='quo"te', id="back\\slash", image="new\nline", name="ünicode", namespace="", pod="p")


def test_containers_page_carries_every_sample_of_the_catalog() -> None:
    page = containers_page(CATALOG, [(LABELS, FULL), (ODD, FULL)])
    assert page.content_type == TEXT
    found = {}
    # This parser, not Prometheus, adds the suffix to a counter that has none.
    for family in parse_text(page.body.decode().replace("# TYPE container_memory_failcnt counter\n", "")):
        for sample in family.samples:
            found[sample.name, frozenset(sample.labels.items())] = sample.value
    expected = {}
    for labels in (LABELS, ODD):
        for metric, (values, number) in samples(CATALOG, labels, FULL):
            expected[metric.name, frozenset(zip(metric.label_keys, values, strict=True))] = number
    assert found == pytest.approx(expected)


def test_containers_page_as_open_metrics() -> None:
    page = containers_page(CATALOG, [(LABELS, FULL)], ACCEPT)
    assert page.content_type == OPEN_METRICS
    families = {family.name: family for family in parse_open_metrics(page.body.decode())}
    assert families["container_cpu_usage_seconds"].type == "counter"
    assert families["container_cpu_usage_seconds"].samples[0].name == "container_cpu_usage_seconds_total"
    assert families["container_memory_failcnt"].type == "unknown"
    assert families["container_memory_working_set_bytes"].type == "gauge"


def test_no_containers_is_an_empty_page() -> None:
    assert containers_page(CATALOG, []).body == b""
    assert containers_page(CATALOG, [], ACCEPT).body == b"# EOF\n"


def test_series_go_with_their_container() -> None:
    both = containers_page(CATALOG, [(LABELS, FULL), (ODD, FULL)]).body
    one = containers_page(CATALOG, [(LABELS, FULL)]).body
    assert b"nicode" in both
    assert b"nicode" not in one


def test_accept_header() -> None:
    assert wants_open_metrics(ACCEPT)
    assert not wants_open_metrics("text/plain;version=0.0.4;q=0.5,*/*;q=0.1")
    assert not wants_open_metrics("")


async def test_agent_page_counts_calls_and_stages() -> None:
    agent = AgentMetrics()
    agent.compute("podkeel_pods", "Pods by state.", ("state",), lambda: [(("ready",), 3.0)])
    agent.compute("podkeel_store_commits_total", "Commits.", (), lambda: [((), 12.0)], counter=True)
    agent.call_began("Version")
    assert agent.calls_in_flight.values["Version",] == 1
    agent.call_ended("Version", "OK", 0.001)
    for code in ("DEADLINE_EXCEEDED", "INTERNAL"):
        agent.call_began("ExecSync")
        agent.call_ended("ExecSync", code, 0.3)
    agent.stage("RunPodSandbox", "network", 0.02)
    agent.stage("RunPodSandbox", "network", 0.2, failed=True)
    for accept, parse in (("", parse_text), (ACCEPT, parse_open_metrics)):
        page = AgentPage().render(gather(agent.instruments), accept)
        values = {}
        for family in parse(page.body.decode()):
            for sample in family.samples:
                values[sample.name, *sorted(sample.labels.values())] = sample.value
        assert values["podkeel_calls_total", "OK", "Version"] == 1
        assert values["podkeel_calls_total", "DEADLINE_EXCEEDED", "ExecSync"] == 1
        assert values["podkeel_calls_total", "ExecSync", "INTERNAL"] == 1
        assert values["podkeel_calls_in_flight", "ExecSync"] == 0
        assert values["podkeel_call_seconds_count", "ExecSync"] == 2
        assert values["podkeel_stage_seconds_sum", "RunPodSandbox", "network"] == pytest.approx(0.22)
        assert values["podkeel_stage_seconds_bucket", "0.025", "RunPodSandbox", "network"] == 1
        assert values["podkeel_stage_seconds_bucket", "0.25", "RunPodSandbox", "network"] == 2
        assert values["podkeel_stage_failures_total", "RunPodSandbox", "network"] == 1
        assert values["podkeel_pods", "ready"] == 3
        assert values["podkeel_store_commits_total",] == 12
        assert values["process_resident_memory_bytes",] > 1_000_000
        assert any(name == "python_info" for name, *_ in values)


def test_what_has_no_labels_is_there_before_anything_happened() -> None:
    """Prometheus does not see a rise from no series."""
    agent = AgentMetrics()
    text = AgentPage().render(gather(agent.instruments), "").body.decode()
    assert "podkeel_image_pull_seconds_count 0.0" in text
    assert 'podkeel_event_loop_lag_seconds_bucket{le="+Inf"} 0.0' in text


async def test_what_waits_for_a_disk_is_read_aside_and_fails_alone() -> None:
    readers: list[str] = []

    def read() -> list[tuple[tuple[str, ...], float]]:
        readers.append(threading.current_thread().name)
        return [((), 7.0)]

    def fail() -> list[tuple[tuple[str, ...], float]]:
        raise OSError(errno.EIO, "Input/output error")

    agent = AgentMetrics()
    agent.compute("podkeel_good_bytes", "", (), read, blocks=True)
    agent.compute("podkeel_bad_bytes", "", (), fail, blocks=True)
    routes = standard_routes(agent, CATALOG, no_entries, list)
    body = (await routes["/metrics"]("")).body.decode()
    assert "podkeel_good_bytes 7.0" in body
    assert "\npodkeel_bad_bytes" not in body
    assert len(readers) == 1
    assert readers[0] != threading.current_thread().name


async def no_entries() -> Entries:
    return []


def test_a_bound_belongs_to_its_own_bucket() -> None:
    histogram = Histogram("h", "", bounds=(1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.observe(value)
    assert histogram.buckets(()) == ([("1.0", 2), ("2.0", 4), ("+Inf", 5)], 14.0)


async def test_a_blocked_loop_shows_as_lag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metrics.agent.LAG_INTERVAL", 0.01)
    agent = AgentMetrics()
    agent.watch_loop()
    await asyncio.sleep(0)  # the task sets its alarm
    time.sleep(0.2)  # noqa: ASYNC251 - blocking is what is to be seen
    await asyncio.sleep(0.02)
    await agent.close()
    _, total = agent.loop_lag.buckets(())
    assert total >= 0.15
