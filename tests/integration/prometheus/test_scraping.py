"""A real Prometheus scrapes a real agent with our configuration: every series that rules and dashboard use is there."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.prometheus.manifests import (
    Query,
    dashboard,
    dashboard_queries,
    metric_of,
    rule_queries,
    rules,
    selectors,
)
from tests.integration.prometheus.server import Prometheus, running_prometheus
from tests.support.agent import AgentProcess, running_agent, wait_for
from tests.support.pods import container_config, run_container, sandbox_config
from tests.support.ports import free_port

LIMITED = cri_pb2.LinuxContainerConfig(
    resources=cri_pb2.LinuxContainerResources(memory_limit_in_bytes=32 << 20, cpu_period=100_000, cpu_quota=50_000)
)
SLEEP = ("sleep", "1000")
NEVER_IDLE = ("sh", "-c", "while :; do sleep 0.05; done")
FILL_MEMORY = ("sh", "-c", "tail /dev/zero")

# Series that exist only after certain events; their names and labels must exist anyway.
NOT_HERE = {'podkeel_recovery_findings_total{kind="unrecovered"}'}
EMPTY_HERE = {"Starts of the agent"}  # it was not started while it was scraped
# Disks and processors are those of the machine that the test runs on.
MACHINES_OWN = {
    *("PodkeelDiskFull", "PodkeelDiskFilling", "PodkeelInodesLow", "PodkeelImagesTakeTheDisk"),
    *("PodkeelEventLoopLag", "PodkeelScrapeSlow", "PodkeelPodStartSlow"),
}


@dataclass(frozen=True)
class Watched:
    """An agent, the Prometheus that scrapes it, and a subscriber to the agent's events."""

    agent: AgentProcess
    prometheus: Prometheus
    events: Iterator[Any]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, busybox: Path) -> Iterator[Watched]:
    """An agent with pods: one was incomplete when the agent was killed, one ends for lack of memory, others are
    removed."""
    target = f"127.0.0.1:{free_port()}"
    options = f'[metrics]\naddress = "{target}"\n'
    folder = tmp_path_factory.mktemp("watched")
    with running_agent(folder, busybox, options=options) as agent:
        die_while_making_a_container(agent)
        events = agent.client.stream("GetContainerEvents", cri_pb2.GetEventsRequest(), timeout=None)
        come_and_go(agent)
        with running_prometheus(tmp_path_factory.mktemp("prometheus"), target) as prometheus:
            wait_for(lambda: prometheus.has_series('podkeel_calls_total{method="RemovePodSandbox"}'), 30, "a scrape")
            for _ in range(2):
                come_and_go(agent)
            run_container(agent, *NEVER_IDLE, linux=LIMITED, name="web")
            _, killed = run_container(agent, *FILL_MEMORY, linux=LIMITED, name="hungry")
            wait_for(lambda: agent.client.status(killed).reason == "OOMKilled", 20, "the out-of-memory kill")
            fail_to_start_and_to_pull(agent)
            wait_for(lambda: all_evaluated_since_two_scrapes(prometheus), 60, "two scrapes and evaluations")
            yield Watched(agent, prometheus, events)


def die_while_making_a_container(agent: AgentProcess) -> None:
    """The next start finds a container half made."""
    agent.restart("CreateContainer.runtime:after:kill")
    with pytest.raises(grpc.RpcError):
        run_container(agent, *SLEEP)
    agent.wait_dead()
    agent.start()


def fail_to_start_and_to_pull(agent: AgentProcess) -> None:
    """An error of each kind."""
    with pytest.raises(grpc.RpcError):
        run_container(agent, "/no/such/program")
    with pytest.raises(grpc.RpcError):
        image = cri_pb2.ImageSpec(image="127.0.0.1:1/none:1")
        agent.client.call("PullImage", cri_pb2.PullImageRequest(image=image))


def come_and_go(agent: AgentProcess) -> None:
    """A pod from nothing to nothing, with a second attempt of its container, as kubelet restarts one."""
    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox)
    for attempt in range(2):
        config = container_config("main", *SLEEP)
        config.metadata.attempt = attempt
        container_id = agent.client.create(sandbox_id, config, sandbox)
        agent.client.start(container_id)
        agent.client.stop(container_id)
    agent.client.remove(container_id)
    agent.client.stop_sandbox(sandbox_id)
    agent.client.remove_sandbox(sandbox_id)


def has_ended(agent: AgentProcess, container_id: str) -> bool:
    return bool(agent.client.status(container_id).state == cri_pb2.CONTAINER_EXITED)


def all_evaluated_since_two_scrapes(prometheus: Prometheus) -> bool:
    """Whether the last thing that happened was scraped twice, and the rules have seen that."""
    scraped = prometheus.vector('count_over_time(podkeel_container_exited_timestamp_seconds{reason="OOMKilled"}[5m])')
    pulled = prometheus.vector('podkeel_image_pulls_total{result="UNKNOWN"} > 0')
    recorded = prometheus.vector("count_over_time(pod:container_cpu_usage_seconds:rate5m[5m])")
    if not pulled or not scraped or scraped[0][1] < 3 or not any(count >= 2 for _, count in recorded):
        return False
    return all(has_value(prometheus, rule["record"]) for rule in rules("record"))


def has_value(prometheus: Prometheus, expression: str) -> bool:
    return any(not math.isnan(value) for _, value in prometheus.vector(expression))


def test_both_jobs_are_up(watched: Watched) -> None:
    jobs = {"podkeel": 1, "podkeel-containers": 1}  # a scrape on a busy machine may come too late, the next one not
    wait_for(lambda: {labels["job"]: value for labels, value in watched.prometheus.vector("up")} == jobs, 20, "both")


@pytest.mark.parametrize("query", list(dashboard_queries()), ids=lambda query: query.place)
def test_every_panel_of_the_dashboard_has_data(watched: Watched, query: Query) -> None:
    if query.place in EMPTY_HERE:
        assert not has_value(watched.prometheus, query.expression), query.expression
    else:
        wait_for(lambda: has_value(watched.prometheus, query.expression), 20, query.expression)


def test_variables_of_the_dashboard_have_values(watched: Watched) -> None:
    found = {}
    for variable in dashboard()["templating"]["list"][1:]:
        asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
        assert asked is not None, variable
        series = watched.prometheus.vector(asked[1].replace("$instance", ".*"))
        found[variable["name"]] = {labels[asked[2]] for labels, _ in series}
    assert found["namespace"] == {"default"}
    assert len(found["instance"]) == 1


@pytest.mark.parametrize("query", list(rule_queries()), ids=lambda query: query.place)
def test_series_of_rules_exist(watched: Watched, query: Query) -> None:
    watched.prometheus.vector(query.expression)
    for selector in selectors(query.expression):
        wanted = metric_of(selector) if selector in NOT_HERE else selector
        wait_for(partial(watched.prometheus.has_series, wanted), 20, f"{selector}, which the agent should expose,")


def test_rules_are_healthy(watched: Watched) -> None:
    groups = watched.prometheus.get("rules")["groups"]
    states: dict[str, Any] = {rule["name"]: rule for group in groups for rule in group["rules"]}
    assert set(states) == {rule.get("alert") or rule["record"] for rule in rules()}
    assert {name: rule["lastError"] for name, rule in states.items() if rule["health"] != "ok"} == {}


def test_recorded_series_have_values(watched: Watched) -> None:
    for rule in rules("record"):
        assert has_value(watched.prometheus, rule["record"]), rule["record"]
        assert all(labels["instance"] for labels, _ in watched.prometheus.vector(rule["record"]))


def test_only_the_expected_alerts_fire(watched: Watched) -> None:
    def firing() -> dict[str, Any]:
        alerts = watched.prometheus.get("alerts")["alerts"]
        return {alert["labels"]["alertname"]: alert for alert in alerts if alert["state"] == "firing"}

    expected = {"PodkeelContainerOutOfMemory", "PodkeelRecoveryFound"}
    wait_for(lambda: expected <= set(firing()), 20, "the alerts")
    found = firing()
    assert set(found) - MACHINES_OWN == expected
    assert found["PodkeelRecoveryFound"]["labels"]["kind"] == "container half made"
    killed = found["PodkeelContainerOutOfMemory"]
    assert killed["labels"]["container"] == "hungry"
    assert killed["annotations"]["summary"] == f"default/{killed['labels']['pod']}: hungry was killed: out of memory"


def test_metrics_of_containers_keep_their_labels(watched: Watched) -> None:
    """Not Prometheus' exported_… ones: dashboards made for kubelet look for these."""
    prometheus = watched.prometheus
    for name in ("container_memory_working_set_bytes", "podkeel_container_restarts_total"):
        selector = f'{name}{{container="web"}}'
        wait_for(partial(prometheus.has_series, selector), 20, selector)
        found = [labels for labels, _ in prometheus.vector(selector)]
        assert len(found) == 1, name
        assert found[0]["namespace"] == "default"
        assert not any(label.startswith("exported_") for label in found[0])


def test_restarts_and_ends_go_with_their_containers(watched: Watched) -> None:
    agent, prometheus = watched.agent, watched.prometheus
    sandbox = sandbox_config(agent)
    pod = sandbox.metadata.name
    sandbox_id = agent.client.run_sandbox(sandbox)
    for attempt in range(3):
        config = container_config("again", "sh", "-c", "exit 4")
        config.metadata.attempt = attempt
        container_id = agent.client.create(sandbox_id, config, sandbox)
        agent.client.start(container_id)
        wait_for(partial(has_ended, agent, container_id))
    restarts = f'podkeel_container_restarts_total{{pod="{pod}",container="again"}}'
    wait_for(
        lambda: [value for _, value in prometheus.vector(restarts)] == [2], seconds=60, what="the restarts are scraped"
    )
    ended = f'time() - podkeel_container_exited_timestamp_seconds{{pod="{pod}",reason="Error"}}'
    ((_, age),) = prometheus.vector(ended)
    assert -1 < age < 120
    agent.client.stop_sandbox(sandbox_id)
    agent.client.remove_sandbox(sandbox_id)
    wait_for(lambda: not prometheus.has_series(restarts), seconds=60, what="the series end with their container")


def test_a_missing_agent_raises_an_alert(watched: Watched) -> None:
    """The last test: nothing is scraped after it."""
    watched.agent.kill()
    pending = 'ALERTS{alertname="PodkeelDown",alertstate="pending"}'
    wait_for(lambda: watched.prometheus.has_series(pending), 20, "the alert")
