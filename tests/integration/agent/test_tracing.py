"""Traces of a real agent, taken by a collector in this process."""

from __future__ import annotations

import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from cri.telemetry.tracing import EXPORT_SECONDS
from proto.runtime.v1 import cri_pb2
from tests.support.agent import BUSYBOX, AgentProcess, running_agent, wait_for
from tests.support.collector import Collector, Received
from tests.support.pods import container_config, remove_all_pods, sandbox_config


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector().serving() as serving:
        yield serving


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, busybox: Path, collector: Collector) -> Iterator[AgentProcess]:
    options = f'[tracing]\nendpoint = "{collector.address}"\n'
    with running_agent(tmp_path_factory.mktemp("tracing"), busybox, options=options) as agent:
        yield agent


@pytest.fixture
def agent(served: AgentProcess, collector: Collector) -> Iterator[AgentProcess]:
    collector.spans.clear()
    yield served
    remove_all_pods(served.client)


class Trace:
    """A caller's span: what it sends along, as kubelet does (W3C Trace Context)."""

    def __init__(self, *, sampled: bool = True) -> None:
        self.trace_id, self.span_id = secrets.token_bytes(16), secrets.token_bytes(8)
        self.metadata = [("traceparent", f"00-{self.trace_id.hex()}-{self.span_id.hex()}-0{int(sampled)}")]


def children(collector: Collector, parent: Span) -> list[Received]:
    return [received for received in collector.spans if received.span.parent_span_id == parent.span_id]


def one(collector: Collector, method: str) -> Received:
    wait_for(lambda: collector.named(f"/{method}"), what=f"the span of {method}")
    (received,) = collector.named(f"/{method}")
    return received


def test_calls_continue_the_caller_s_trace_and_have_their_stages_as_children(
    agent: AgentProcess, collector: Collector
) -> None:
    client, trace = agent.client, Trace()
    sandbox = sandbox_config(agent, "traced")
    begin = time.time_ns()
    sandbox_id = client.call(
        "RunPodSandbox", cri_pb2.RunPodSandboxRequest(config=sandbox), metadata=trace.metadata
    ).pod_sandbox_id
    create = cri_pb2.CreateContainerRequest(
        pod_sandbox_id=sandbox_id, config=container_config("web", "sleep", "1000"), sandbox_config=sandbox
    )
    container_id = client.call("CreateContainer", create, metadata=trace.metadata).container_id
    start = cri_pb2.StartContainerRequest(container_id=container_id)
    client.call("StartContainer", start, metadata=trace.metadata)
    remove = cri_pb2.RemoveContainerRequest(container_id=container_id)
    client.call("RemoveContainer", remove, metadata=trace.metadata)
    end = time.time_ns()

    pod = {
        "k8s.namespace.name": "default",
        "k8s.pod.name": "traced",
        "k8s.pod.uid": "uid-traced",
        "podkeel.sandbox.id": sandbox_id,
    }
    container = {"container.id": container_id, "k8s.container.name": "web", "container.image.name": BUSYBOX}
    previous = begin
    for method, stages, objects in (
        ("RunPodSandbox", {"network", "namespaces"}, pod),
        ("CreateContainer", {"runtime"}, pod | container),
        ("StartContainer", set(), pod | container),
        ("RemoveContainer", set(), pod | container),
    ):
        received = one(collector, method)
        span = received.span
        assert span.name == f"runtime.v1.RuntimeService/{method}"
        assert span.kind == Span.SPAN_KIND_SERVER
        assert (span.trace_id, span.parent_span_id) == (trace.trace_id, trace.span_id)
        assert previous <= span.start_time_unix_nano < span.end_time_unix_nano <= end
        previous = span.end_time_unix_nano
        rpc = {"rpc.system": "grpc", "rpc.service": "runtime.v1.RuntimeService", "rpc.method": method}
        assert received.attributes == objects | rpc | {"rpc.grpc.status_code": 0}
        assert received.resource["service.name"] == "podkeel"
        of_stages = children(collector, span)
        assert {child.span.name for child in of_stages} >= {f"{method}.{stage}" for stage in stages}
        assert of_stages
        for child in of_stages:
            assert child.span.trace_id == trace.trace_id
            operation, stage = child.attributes["podkeel.operation"], child.attributes["podkeel.stage"]
            assert operation in (method, "StopContainer")  # removal stops it first
            assert child.span.name == f"{operation}.{stage}"
            assert span.start_time_unix_nano <= child.span.start_time_unix_nano
            assert child.span.start_time_unix_nano < child.span.end_time_unix_nano
            # Stages are timed by the monotonic clock, calls by that of the day.
            assert child.span.end_time_unix_nano <= span.end_time_unix_nano + 5_000_000


def test_failures_are_errors_of_the_call_and_of_its_stage(agent: AgentProcess, collector: Collector) -> None:
    client, trace = agent.client, Trace()
    sandbox = sandbox_config(agent)
    sandbox_id = client.run_sandbox(sandbox)
    container_id = client.create(sandbox_id, container_config("bad", "/no/such/program"), sandbox)
    with pytest.raises(grpc.RpcError) as raised:
        start = cri_pb2.StartContainerRequest(container_id=container_id)
        client.call("StartContainer", start, metadata=trace.metadata)
    with pytest.raises(grpc.RpcError):
        ask = cri_pb2.ContainerStatusRequest(container_id="f" * 64)
        client.call("ContainerStatus", ask, metadata=trace.metadata)
    failed, missing = one(collector, "StartContainer"), one(collector, "ContainerStatus")
    assert failed.attributes["rpc.grpc.status_code"] == raised.value.code().value[0]
    assert failed.span.status.code == Status.STATUS_CODE_UNSET  # the pod's fault
    assert [c.span.status.code for c in children(collector, failed.span)][-1] == Status.STATUS_CODE_ERROR
    assert missing.attributes["rpc.grpc.status_code"] == grpc.StatusCode.NOT_FOUND.value[0]
    assert missing.attributes["container.id"] == "f" * 64
    assert missing.span.status.code == Status.STATUS_CODE_UNSET  # the client's fault
    with pytest.raises(grpc.RpcError) as raised:
        image = cri_pb2.ImageSpec(image="127.0.0.1:1/nobody/listens")
        client.call("PullImage", cri_pb2.PullImageRequest(image=image), metadata=trace.metadata)
    pull = one(collector, "PullImage")
    assert pull.attributes["rpc.grpc.status_code"] == raised.value.code().value[0]
    assert pull.span.status.code == Status.STATUS_CODE_ERROR
    assert pull.span.status.message == raised.value.details()


def test_the_caller_decides_what_is_traced(agent: AgentProcess, collector: Collector) -> None:
    request, wanted = cri_pb2.VersionRequest(), Trace()
    for metadata in (Trace(sampled=False).metadata, [], [("traceparent", "nonsense")]):
        agent.client.call("Version", request, metadata=metadata)
    agent.client.call("Version", request, metadata=wanted.metadata)
    assert one(collector, "Version").span.trace_id == wanted.trace_id
    assert len(collector.spans) == 1


def test_tls_and_calls_without_a_caller_s_trace(tmp_path: Path, busybox: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(certificate), "-subj", "/CN=t"]
    subprocess.run([*command, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    pair = (key.read_bytes(), certificate.read_bytes())
    credentials = grpc.ssl_server_credentials([pair], root_certificates=pair[1], require_client_auth=True)
    with Collector(credentials).serving() as collector:
        options = f'[tracing]\nendpoint = "{collector.address}"\nsampling_rate_per_million = 1000000\ntls = true\n'
        options += f'tls_ca = "{certificate}"\ntls_certificate = "{certificate}"\ntls_key = "{key}"\n'
        with running_agent(tmp_path, busybox, options=options) as agent:
            agent.client.run_sandbox(sandbox_config(agent))
            agent.stop()  # sends what still waits
            received = one(collector, "RunPodSandbox")
            assert received.span.parent_span_id == b""
            assert children(collector, received.span)
            agent.start()


def test_an_unreachable_collector_is_logged_once(tmp_path: Path, busybox: Path) -> None:
    with socket.socket() as taken:  # bound, but without a listener: no other process gets the port
        taken.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{taken.getsockname()[1]}"
        options = f'[tracing]\nendpoint = "{endpoint}"\nsampling_rate_per_million = 1000000\n'
        with running_agent(tmp_path, busybox, options=options) as agent:
            for _ in range(3):
                wait_for(
                    lambda: f"tracing: {endpoint} does not accept traces" in agent.log.read_text(), 20, "the complaint"
                )
                agent.client.call("Version", cri_pb2.VersionRequest())
            begin = time.monotonic()
            agent.stop()
            assert (
                time.monotonic() - begin < EXPORT_SECONDS
            )  # as long as an end that waits for the collector would take
            assert agent.log.read_text().count("does not accept traces") == 1
            assert "Traceback" not in agent.log.read_text()
            agent.start()
