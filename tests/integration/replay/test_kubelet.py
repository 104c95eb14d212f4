"""The pods of two recorded kubelets, asked for again request by request; every answer read as a kubelet reads it."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from google.protobuf.json_format import ParseDict

from host import libc
from host.files import mounts
from proto.runtime.v1 import cri_pb2
from tests.integration.replay import recording, volumes
from tests.integration.replay.conftest import Kubelet
from tests.integration.replay.player import Exchange, Played
from tests.integration.replay.recording import Json, Names
from tests.integration.replay.rules import check
from tests.support.agent import AgentProcess, wait_for
from tests.support.pods import log_lines

CALLS = [
    (name, method)
    for name in ("standalone", "cluster")
    for method in sorted({entry.method for entry in recording.entries(name)} - {"GetContainerEvents"})
]


@pytest.mark.parametrize(("name", "method"), CALLS)
def test_answers(name: str, method: str, request: pytest.FixtureRequest) -> None:
    played: Played = request.getfixturevalue(name)
    for exchange in played.of(method):
        try:
            check(played, exchange)
        except (AssertionError, KeyError) as error:
            raise AssertionError(f"{_told(exchange)}\n{error!r}") from error


def _told(exchange: Exchange) -> str:
    answer = exchange.answer or f"{exchange.code}: {exchange.message}"
    return f"line {exchange.entry.number}\nsent {exchange.request}\ngot {answer}\nrecorded {exchange.expected}"


def test_events_come_in_the_recorded_order(standalone: Played) -> None:
    recorded, ours = _by_object(standalone.recorded_events), _by_object(standalone.events)
    assert recorded.keys() == ours.keys()
    for object_id, kinds in recorded.items():
        assert ours[object_id] == [*kinds, "CONTAINER_DELETED_EVENT"]


def _by_object(events: list[Json]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for event in events:
        kind = event.get("container_event_type", "CONTAINER_CREATED_EVENT")
        found.setdefault(event["container_id"], []).append(kind)
    return found


def test_events_show_the_pod_and_all_its_containers(standalone: Played) -> None:
    (sandbox_id,) = standalone.sandboxes
    states = {
        "CONTAINER_CREATED_EVENT": (None,),
        "CONTAINER_STARTED_EVENT": ("CONTAINER_RUNNING", "CONTAINER_EXITED"),
        "CONTAINER_STOPPED_EVENT": ("CONTAINER_EXITED",),
    }
    made: list[str] = []
    for event in standalone.events:
        kind = event.get("container_event_type", "CONTAINER_CREATED_EVENT")
        subject = event["container_id"]
        assert event["pod_sandbox_status"]["id"] == sandbox_id
        statuses = {status["id"]: status for status in event.get("containers_statuses", [])}
        if kind == "CONTAINER_CREATED_EVENT" and subject != sandbox_id:
            made.append(subject)
        if kind == "CONTAINER_DELETED_EVENT":
            assert subject not in statuses
            continue
        assert list(statuses) == made
        if subject != sandbox_id:
            assert statuses[subject].get("state") in states[kind]
    stopped = [event for event in standalone.events if event["container_id"] == sandbox_id][2]
    assert stopped["pod_sandbox_status"]["state"] == "SANDBOX_NOTREADY"


def _log_of(played: Played, pod: str, container: str, attempt: int = 0) -> Path:
    (config,) = (config for config in played.sandboxes.values() if config.metadata.name == pod)
    return Path(config.log_directory, container, f"{attempt}.log")


def test_logs_say_what_the_containers_saw(standalone: Played, cluster: Played) -> None:
    assert any(" on /work type " in line for line in log_lines(_log_of(standalone, "web-peer", "prepare")))
    for pod in ("job-jppm5", "job-lgz2b", "job-w7czl", "job-9pldp", "job-qsdp8"):
        assert log_lines(_log_of(cluster, pod, "j")) == ["done", "ca.crt", "namespace", "token"]
    assert {"bin", "etc"} <= set(log_lines(_log_of(cluster, "imgvol", "main")))
    line = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}(Z|\+00:00) stdout F .*")
    for text in _log_of(cluster, "job-jppm5", "j").read_text().splitlines():
        assert line.fullmatch(text)


def _token_buckets() -> Counter[str]:
    """The rates of all token buckets on this host's links."""
    shown = subprocess.run(["tc", "qdisc", "show"], capture_output=True, text=True, check=True).stdout
    return Counter(re.findall(r"^qdisc tbf .* rate (\w+)", shown, re.MULTILINE))


def test_pod_with_many_fields_runs_where_its_host_path_can_be_shared(agent: AgentProcess, kubelet: Kubelet) -> None:
    """Recorded on a host whose root mount was private, where this pod's container was refused."""
    names = Names(kubelet.names)
    found = [entry for entry in recording.entries("cluster") if entry.method in ("RunPodSandbox", "CreateContainer")]
    run = next(e for e in found if e.request["config"]["metadata"]["name"] == "many")
    make = next(e for e in found if e.code)
    sandbox = ParseDict(names.put(run.request["config"]), cri_pb2.PodSandboxConfig())
    config = ParseDict(names.put(make.request["config"]), cri_pb2.ContainerConfig())
    config.mounts[0].recursive_read_only = False
    buckets = _token_buckets()
    host = Path(config.mounts[1].host_path)
    libc.mount("tmpfs", str(host), "tmpfs", 0, "size=64k")
    try:
        libc.mount("", str(host), "", mounts.MS_SHARED, "")
        volumes.prepare(config, kubelet.folder / "lib")
        sandbox_id = agent.client.run_sandbox(sandbox)
        container_id = agent.client.create(sandbox_id, config, sandbox)
        agent.client.start(container_id)
        log = Path(agent.client.status(container_id).log_path)
        wait_for(lambda: log.exists() and "ndots" in log.read_text(), what="the log line")
        output = [line.rstrip("\r") for line in log_lines(log)]
        assert output[0].startswith("uid=1000 gid=1500")
        assert output[0].endswith("groups=1500,2000,3000")
        assert output[1:] == ["search a.example b.example", "nameserver 10.96.0.10", "options edns0 ndots:2"]
        user = agent.client.status(container_id).user.linux
        assert (user.uid, user.gid, list(user.supplemental_groups)) == (1000, 1500, [1500, 2000, 3000])
        ports = agent.client.output(container_id, "cat", "/proc/sys/net/ipv4/ip_local_port_range")
        assert ports.split() == ["20000", "30000"]
        assert _token_buckets() - buckets == Counter(["10Mbit", "5Mbit"])
        (host / "late").mkdir()
        libc.mount("tmpfs", str(host / "late"), "tmpfs", 0, "size=64k")
        assert "/p/late" in agent.client.output(container_id, "cat", "/proc/mounts")
        assert "/dev/term " in agent.client.output(container_id, "cat", "/proc/mounts")
    finally:
        agent.client.stop_sandbox(sandbox_id)
        agent.client.remove_sandbox(sandbox_id)
        mounts.unmount(host / "late")
        mounts.unmount(host)
