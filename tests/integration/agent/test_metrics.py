"""The metrics address of a real agent, read with Prometheus' own parsers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open_metrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from cri.config.options import DEFAULT_METRICS_ADDRESS
from proto.runtime.v1 import cri_pb2
from tests.integration.streaming.test_server import make_certificates
from tests.support.agent import BUSYBOX, AgentProcess, running_agent, wait_for
from tests.support.image_builder import BuiltImage, entry, make_tar
from tests.support.pods import remove_all_pods, run_container
from tests.support.registry import run_registry

OPTIONS = '[metrics]\naddress = "127.0.0.1:0"\n[log]\nformat = "json"\n'
OPEN_METRICS = "application/openmetrics-text;version=1.0.0"
SLEEP = ("sleep", "1000")

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, busybox: Path) -> Iterator[AgentProcess]:
    with running_agent(tmp_path_factory.mktemp("metrics"), busybox, options=OPTIONS) as agent:
        yield agent


@pytest.fixture
def agent(served: AgentProcess) -> Iterator[AgentProcess]:
    yield served
    remove_all_pods(served.client)


def address(agent: AgentProcess) -> str:
    found = re.findall(r"metrics: serving on (https?://127\.0\.0\.1:\d+)", agent.log.read_text())
    return str(found[-1])


def fetch(agent: AgentProcess, path: str, accept: str = "", **how: Any) -> tuple[int, str, str]:
    request = urllib.request.Request(address(agent) + path, headers={"Accept": accept})
    try:
        with urllib.request.urlopen(request, timeout=20, **how) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, "", error.read().decode()


def series(text: str, *, open_metrics: bool = False) -> Series:
    parse: Callable[[str], Iterable[Metric]] = parse_open_metrics if open_metrics else parse_text
    families = parse(text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def scrape(agent: AgentProcess, path: str = "/metrics") -> Series:
    status, _, text = fetch(agent, path)
    assert status == 200, text
    return series(text)


def value(found: Series, name: str, **labels: str) -> float:
    return found.get((name, frozenset(labels.items())), 0.0)


def lines(agent: AgentProcess) -> list[dict[str, Any]]:
    return [json.loads(line) for line in agent.log.read_text().splitlines()]


def test_calls_stages_and_states_are_counted(agent: AgentProcess) -> None:
    before = scrape(agent)
    run_container(agent, *SLEEP)
    with pytest.raises(grpc.RpcError):
        agent.client.status("f" * 64)
    after = scrape(agent)

    def rise(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert rise("podkeel_calls_total", method="RunPodSandbox", code="OK") == 1
    assert rise("podkeel_calls_total", method="ContainerStatus", code="NOT_FOUND") == 1
    none_yet = ("podkeel_calls_total", frozenset({("method", "ContainerStatus"), ("code", "INTERNAL")}))
    assert after[none_yet] == 0, "an alert on errors sees the first one"
    assert rise("podkeel_call_seconds_count", method="StartContainer") == 1
    assert 0 < rise("podkeel_call_seconds_sum", method="StartContainer") < 10
    assert value(after, "podkeel_calls_in_flight", method="RunPodSandbox") == 0
    assert rise("podkeel_stage_seconds_count", operation="RunPodSandbox", stage="network") == 1
    assert rise("podkeel_stage_seconds_count", operation="CreateContainer", stage="runtime") == 1
    assert rise("podkeel_store_commits_total") >= 4
    assert value(after, "podkeel_pods", state="ready") == 1
    assert value(after, "podkeel_containers", state="running") == 1
    assert value(after, "podkeel_images") == 1
    assert value(after, "process_resident_memory_bytes") > 10e6
    wait_for(lambda: value(scrape(agent), "podkeel_event_loop_lag_seconds_count") > 2, what="lag is measured")


def test_failures_are_counted(agent: AgentProcess) -> None:
    sandbox_id, _ = run_container(agent, *SLEEP)
    before = scrape(agent)
    bad = cri_pb2.ContainerConfig(
        metadata=cri_pb2.ContainerMetadata(name="bad"), image=cri_pb2.ImageSpec(image=BUSYBOX), command=["/no/such"]
    )
    container_id = agent.client.create(sandbox_id, bad, cri_pb2.PodSandboxConfig())
    with pytest.raises(grpc.RpcError):
        agent.client.start(container_id)
    with pytest.raises(grpc.RpcError):
        image = cri_pb2.ImageSpec(image="127.0.0.1:1/none:1")
        agent.client.call("PullImage", cri_pb2.PullImageRequest(image=image))
    after = scrape(agent)

    def risen(name: str) -> dict[str, float]:
        return {
            ",".join(value for _, value in sorted(labels)): number - before.get((key, labels), 0)
            for (key, labels), number in after.items()
            if key == name and number > before.get((key, labels), 0)
        }

    assert list(risen("podkeel_program_failures_total").values()) == [1]
    assert risen("podkeel_image_pulls_total") == {"UNKNOWN": 1}
    assert risen("podkeel_stage_failures_total")["PullImage,resolve"] == 1


def test_pulls_are_counted_in_bytes_and_seconds(agent: AgentProcess) -> None:
    before = scrape(agent)
    size = 300_000
    image = BuiltImage((make_tar([entry("file", os.urandom(size))]),))
    with run_registry() as registry:
        reference = registry.push(image, "test/pulled")
        request = cri_pb2.PullImageRequest(image=cri_pb2.ImageSpec(image=reference))
        for _ in range(2):  # what is there already is not fetched again
            agent.client.call("PullImage", request)
    after = scrape(agent)
    fetched = value(after, "podkeel_image_pull_bytes_total") - value(before, "podkeel_image_pull_bytes_total")
    assert size <= fetched < 1.2 * size
    assert value(after, "podkeel_image_pulls_total", result="OK") == 2
    assert value(after, "podkeel_image_pull_seconds_count") - value(before, "podkeel_image_pull_seconds_count") == 2
    assert any(line.get("image") == reference and line["seconds"] > 0 for line in lines(agent))
    agent.client.call("RemoveImage", cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image=reference)))


def test_containers_by_kubelets_labels_until_they_are_gone(agent: AgentProcess) -> None:
    sandbox_id, container_id = run_container(agent, *SLEEP, name="web")
    pod = agent.client.sandbox_status(sandbox_id).metadata.name
    status, content_type, text = fetch(agent, "/metrics/cadvisor")
    assert status == 200
    assert content_type.startswith("text/plain; version=0.0.4")
    # This parser, not Prometheus, adds the suffix to a counter that has none.
    found = series(text.replace("# TYPE container_memory_failcnt counter\n", ""))
    of_container = {name: dict(labels) for name, labels in found if ("container", "web") in labels}
    usage = of_container["container_memory_working_set_bytes"]
    assert usage.pop("id").endswith(f"/{container_id}")
    assert usage == {"container": "web", "namespace": "default", "pod": pod, "image": BUSYBOX, "name": container_id}
    assert {"container_cpu_usage_seconds_total", "container_fs_usage_bytes", "container_processes"} < set(of_container)
    assert "container_network_receive_bytes_total" not in of_container
    of_pod = {name: dict(labels) for name, labels in found if ("container", "") in labels and ("pod", pod) in labels}
    assert of_pod["container_network_receive_bytes_total"]["interface"] == "eth0"
    assert of_pod["container_memory_working_set_bytes"]["id"] in of_container["container_threads"]["id"]
    agent.client.remove(container_id)
    assert container_id not in fetch(agent, "/metrics/cadvisor")[2]
    agent.client.stop_sandbox(sandbox_id)
    assert fetch(agent, "/metrics/cadvisor")[2] == ""


def test_open_metrics_are_sent_on_request(agent: AgentProcess) -> None:
    run_container(agent, *SLEEP)
    for path in ("/metrics", "/metrics/cadvisor"):
        status, content_type, text = fetch(agent, path, OPEN_METRICS)
        assert (status, content_type.split(";")[0]) == (200, "application/openmetrics-text")
        assert text.endswith("# EOF\n")
        assert series(text, open_metrics=True)


def test_health(agent: AgentProcess) -> None:
    assert fetch(agent, "/healthz")[::2] == (200, "ok\n")
    assert fetch(agent, "/readyz")[::2] == (200, "ok\n")
    assert fetch(agent, "/nothing")[0] == 404


def test_changes_are_logged_once_with_ids_and_duration(agent: AgentProcess) -> None:
    sandbox_id, container_id = run_container(
        agent, *SLEEP, envs=[cri_pb2.KeyValue(key="KEY", value=b"secret-of-the-test")]
    )
    agent.client.remove(container_id)
    agent.client.stop_sandbox(sandbox_id)
    agent.client.remove_sandbox(sandbox_id)
    mine = [line for line in lines(agent) if line.get("sandbox") == sandbox_id]
    about_container = [line for line in mine if line.get("container") == container_id]
    kinds = [re.search(r"\): (\w+)", line["message"]) for line in mine]
    assert [kind and kind[1] for kind in kinds] == [
        *("ready", "created", "started", "exited", "removed", "stopped", "removed"),
    ]
    assert len(about_container) == 4
    for line in mine:
        assert line["namespace"] == "default"
        assert 0 <= line["seconds"] < 20  # the end's time is from a coarse clock
    assert "secret-of-the-test" not in agent.log.read_text()


def test_log_level_changes_while_the_agent_runs(agent: AgentProcess) -> None:
    def has(level: str, message: str) -> bool:
        return any(line["level"] == level and message in line["message"] for line in lines(agent))

    def miss(number: str) -> None:
        with pytest.raises(grpc.RpcError):
            agent.client.status(number * 64)

    miss("1")
    os.kill(agent.pid(), signal.SIGUSR1)
    wait_for(lambda: has("debug", "level: debug from now on"))
    miss("2")
    secret = "secret-in-everything"
    run_container(agent, "echo", secret, envs=[cri_pb2.KeyValue(key="KEY", value=secret.encode())])
    pull = cri_pb2.PullImageRequest(
        image=cri_pb2.ImageSpec(image="127.0.0.1:1/none:1"), auth=cri_pb2.AuthConfig(username="me", password=secret)
    )
    with pytest.raises(grpc.RpcError):
        agent.client.call("PullImage", pull)
    os.kill(agent.pid(), signal.SIGUSR2)
    wait_for(lambda: has("info", "level: info from now on"))
    miss("3")
    assert [has("debug", number * 64) for number in "123"] == [False, True, False]
    assert secret not in agent.log.read_text()


def test_https_and_repairs_at_start(tmp_path: Path, busybox: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += [
        "-keyout",
        str(key),
        "-out",
        str(certificate),
        "-subj",
        "/CN=t",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
    ]
    subprocess.run(command, check=True, capture_output=True)
    options = f'[metrics]\naddress = "127.0.0.1:0"\ntls_certificate = "{certificate}"\ntls_key = "{key}"\n'
    trusted = ssl.create_default_context(cafile=str(certificate))
    with running_agent(tmp_path, busybox, options=options) as agent:
        _, container_id = run_container(agent, "sleep", "0.2")
        init = Path(f"/proc/{json.loads(verbose(agent, container_id))['pid']}")
        agent.kill()
        wait_for(lambda: not init.exists(), what="the end of the container's process")
        agent.start()
        status, _, text = fetch(agent, "/metrics", context=trusted)
        assert status == 200
        assert value(series(text), "podkeel_recovery_findings_total", kind="container ended meanwhile") == 1
        with pytest.raises(urllib.error.URLError):
            fetch(agent, "/metrics")


def test_clients_that_must_show_a_certificate(tmp_path: Path, busybox: Path) -> None:
    make_certificates(tmp_path)
    trusted = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    options = f"""
    [metrics]
    address = "127.0.0.1:0"
    tls_certificate = "{tmp_path}/server.pem"
    tls_key = "{tmp_path}/server.key"
    tls_client_ca = "{tmp_path}/ca.pem"
    """
    with running_agent(tmp_path, busybox, options=options) as agent:
        for path in ("/metrics", "/healthz"):
            with pytest.raises((urllib.error.URLError, OSError)):  # in TLS 1.3 it may come with the first read only
                fetch(agent, path, context=trusted)
        trusted.load_cert_chain(tmp_path / "client.pem", tmp_path / "client.key")
        assert fetch(agent, "/metrics", context=trusted)[0] == 200


def verbose(agent: AgentProcess, container_id: str) -> str:
    request = cri_pb2.ContainerStatusRequest(container_id=container_id, verbose=True)
    return str(agent.client.call("ContainerStatus", request).info["info"])


def test_a_taken_default_address_keeps_no_agent_from_serving(tmp_path: Path, busybox: Path) -> None:
    host, _, port = DEFAULT_METRICS_ADDRESS.rpartition(":")
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # another process has it already, which is as good
            stack.enter_context(socket.create_server((host, int(port))))
        agent = stack.enter_context(running_agent(tmp_path, busybox, options="[metrics]"))
        assert agent.client.call("Version", cri_pb2.VersionRequest()).runtime_name == "podkeel"
        assert f"metrics: not served: metrics.address {DEFAULT_METRICS_ADDRESS}" in agent.log.read_text()


def test_metrics_are_on_loopback_by_default(tmp_path: Path, busybox: Path) -> None:
    host, _, port = DEFAULT_METRICS_ADDRESS.rpartition(":")
    try:
        socket.create_server((host, int(port))).close()
    except OSError:
        pytest.skip(f"{DEFAULT_METRICS_ADDRESS} is taken on this machine")
    health = f"http://{DEFAULT_METRICS_ADDRESS}/healthz"
    with running_agent(tmp_path, busybox, options="[metrics]"), urllib.request.urlopen(health, timeout=10) as answer:
        assert answer.status == 200


def test_nothing_is_served_where_no_address_is_given(shared_agent: AgentProcess) -> None:
    assert "serving the CRI" in shared_agent.log.read_text()
    assert "serving metrics" not in shared_agent.log.read_text()
