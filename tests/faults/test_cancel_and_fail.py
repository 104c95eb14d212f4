"""A call whose client leaves or whose stage fails is undone completely, and its name is free at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from proto.podkeel.v1 import agent_pb2
from proto.runtime.v1 import cri_pb2
from tests.faults.conftest import Stage
from tests.faults.points import points
from tests.support.agent import wait_for
from tests.support.pods import POLITE, container_config, run_container, sandbox_config, shared_pids

Call = tuple[str, Any]


@pytest.fixture
def call_of(stage: Stage) -> Iterator[Callable[[str], Call]]:
    """Makes call and request for an operation, with all objects that it needs."""

    def make(operation: str) -> Call:
        match operation:
            case "RunPodSandbox":
                sandbox = sandbox_config(stage.agent)
                sandbox.port_mappings.add(protocol=cri_pb2.TCP, container_port=80, host_port=28081)
                return operation, cri_pb2.RunPodSandboxRequest(config=sandbox)
            case "CreateContainer":
                sandbox = sandbox_config(stage.agent)
                container = container_config("main", *POLITE)
                shared_pids(container)
                sandbox_id = stage.agent.client.run_sandbox(sandbox)
                return operation, cri_pb2.CreateContainerRequest(
                    pod_sandbox_id=sandbox_id, config=container, sandbox_config=sandbox
                )
            case "PullImage":
                return operation, cri_pb2.PullImageRequest(image=cri_pb2.ImageSpec(image=stage.reference))
            case _:
                return operation, agent_pb2.ImportImageRequest(path=str(stage.archive))

    yield make
    stage.agent.plant("")
    _remove_images(stage)


def _remove_images(stage: Stage) -> None:
    for reference in (stage.reference, "example.org/imported:1"):
        request = cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image=reference))
        stage.agent.client.call("RemoveImage", request)


def _cancel_at(stage: Stage, point: str, call: Call) -> None:
    """Make a call, and cancel it once it hangs at ``point``."""
    log = stage.agent.log
    before = log.stat().st_size
    stage.agent.plant(f"{point}:hang")
    future = stage.agent.client.future(*call)
    wait_for(lambda: f"faults: {point}: hanging" in log.read_bytes()[before:].decode(), what=f"stage {point}")
    future.cancel()
    stage.agent.plant("")


@pytest.mark.parametrize("point", points("RunPodSandbox", "CreateContainer", "PullImage", "ImportImage"))
def test_a_cancelled_call_leaves_nothing_and_frees_the_name(
    stage: Stage, call_of: Callable[[str], Call], point: str
) -> None:
    name, request = call_of(point.partition(".")[0])
    _cancel_at(stage, point, (name, request))
    stage.assert_whole()
    _remove_images(stage)
    _cancel_at(stage, point, (name, request))
    if name in ("RunPodSandbox", "CreateContainer"):
        request.config.labels["another"] = "configuration"
    stage.agent.client.call(name, request)


def test_a_joined_call_continues_without_its_first_client(stage: Stage) -> None:
    sandbox = sandbox_config(stage.agent)
    request = cri_pb2.RunPodSandboxRequest(config=sandbox)
    first = stage.agent.client.future("RunPodSandbox", request)
    second = stage.agent.client.future("RunPodSandbox", request)
    first.cancel()
    items = stage.agent.client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest()).items
    sandbox_id = second.result().pod_sandbox_id
    assert stage.agent.client.sandbox_status(sandbox_id).state == cri_pb2.SANDBOX_READY
    assert len(items) <= 2


@pytest.mark.parametrize("point", points("RunPodSandbox", "CreateContainer", "PullImage", "ImportImage"))
def test_a_failed_stage_is_named_and_undone(stage: Stage, call_of: Callable[[str], Call], point: str) -> None:
    operation, _, step = point.rpartition(":")[0].partition(".")
    name, request = call_of(operation)
    stage.agent.plant(f"{point}:error")
    with pytest.raises(grpc.RpcError) as failed:
        stage.agent.client.call(name, request)
    assert failed.value.code() == grpc.StatusCode.INTERNAL
    assert f"step {step}" in str(failed.value.details())
    stage.assert_whole()
    stage.agent.plant("")
    stage.agent.client.call(name, request)


@pytest.mark.parametrize(
    "point",
    points("StopContainer", "RemoveContainer", "StopPodSandbox", "RemovePodSandbox", "UpdateContainerResources"),
)
def test_a_call_that_failed_at_any_stage_can_be_repeated(stage: Stage, point: str) -> None:
    client = stage.agent.client
    shared = cri_pb2.LinuxContainerConfig()
    shared.security_context.namespace_options.pid = cri_pb2.POD
    sandbox_id, container_id = run_container(stage.agent, "sleep", "1000", linux=shared)
    operation = point.partition(".")[0]
    request: Any = {
        "StopContainer": cri_pb2.StopContainerRequest(container_id=container_id),
        "RemoveContainer": cri_pb2.RemoveContainerRequest(container_id=container_id),
        "StopPodSandbox": cri_pb2.StopPodSandboxRequest(pod_sandbox_id=sandbox_id),
        "RemovePodSandbox": cri_pb2.RemovePodSandboxRequest(pod_sandbox_id=sandbox_id),
        "UpdateContainerResources": cri_pb2.UpdateContainerResourcesRequest(
            container_id=container_id, linux=cri_pb2.LinuxContainerResources(memory_limit_in_bytes=64 << 20)
        ),
    }[operation]
    stage.agent.plant(f"{point}:error")
    with pytest.raises(grpc.RpcError) as failed:
        client.call(operation, request)
    assert failed.value.code() == grpc.StatusCode.INTERNAL
    stage.agent.plant("")
    client.call(operation, request)
    stage.assert_whole()


def test_a_removal_continues_without_its_client(stage: Stage) -> None:
    client = stage.agent.client
    sandbox_id, _ = run_container(stage.agent, "sleep", "1000")
    future = client.future("RemovePodSandbox", cri_pb2.RemovePodSandboxRequest(pod_sandbox_id=sandbox_id))
    listing = cri_pb2.ListPodSandboxRequest(filter=cri_pb2.PodSandboxFilter(id=sandbox_id))
    future.cancel()
    client.remove_sandbox(sandbox_id)
    assert not client.call("ListPodSandbox", listing).items
    stage.assert_whole()
