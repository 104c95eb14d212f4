"""Objects that could not be removed or undone are listed, and block nothing else."""

from __future__ import annotations

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.faults.conftest import Stage
from tests.support.pods import container_config, run_container, sandbox_config


def _listed(stage: Stage) -> tuple[dict[str, int], dict[str, int]]:
    client = stage.agent.client
    pods = client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest()).items
    containers = client.call("ListContainers", cri_pb2.ListContainersRequest()).containers
    return {pod.id: pod.state for pod in pods}, {container.id: container.state for container in containers}


@pytest.mark.parametrize(
    "place", ["intent:before", "intent:after", "runtime:before", "snapshot:after", "forget:before"]
)
def test_a_container_that_could_not_be_removed_is_listed_and_can_be_removed(stage: Stage, place: str) -> None:
    sandbox_id, container_id = run_container(stage.agent, "sleep", "1000")
    client = stage.agent.client
    stage.agent.plant(f"RemoveContainer.{place}:error")
    for _ in range(2):
        with pytest.raises(grpc.RpcError, match="fault planted"):
            client.remove(container_id)
        assert _listed(stage)[1][container_id] == cri_pb2.CONTAINER_EXITED
    stage.agent.plant("")
    client.remove(container_id)
    assert container_id not in _listed(stage)[1]
    client.stop_sandbox(sandbox_id)
    client.remove_sandbox(sandbox_id)


@pytest.mark.parametrize("place", ["intent:before", "intent:after", "forget:before"])
def test_a_pod_that_could_not_be_removed_is_listed_and_can_be_removed(stage: Stage, place: str) -> None:
    client = stage.agent.client
    config = sandbox_config(stage.agent)
    sandbox_id = client.run_sandbox(config)
    client.stop_sandbox(sandbox_id)
    stage.agent.plant(f"RemovePodSandbox.{place}:error")
    with pytest.raises(grpc.RpcError, match="fault planted"):
        client.remove_sandbox(sandbox_id)
    assert _listed(stage)[0][sandbox_id] == cri_pb2.SANDBOX_NOTREADY
    stage.agent.restart(f"@{stage.agent.folder / 'faults'}")
    if place == "intent:before":
        assert _listed(stage)[0][sandbox_id] == cri_pb2.SANDBOX_NOTREADY
    stage.agent.plant("")
    client = stage.agent.client
    client.remove_sandbox(sandbox_id)
    assert sandbox_id not in _listed(stage)[0]
    again = client.run_sandbox(config)
    client.stop_sandbox(again)
    client.remove_sandbox(again)


def test_a_removal_that_the_next_start_cannot_finish_is_listed(stage: Stage) -> None:
    sandbox_id, container_id = run_container(stage.agent, "true")
    stage.agent.plant("RemoveContainer.runtime:before:kill")
    with pytest.raises(grpc.RpcError):
        stage.agent.client.remove(container_id)
    stage.agent.wait_dead()
    stage.agent.plant("RemoveContainer.runtime:before:error")
    stage.agent.start()
    assert _listed(stage)[1][container_id] == cri_pb2.CONTAINER_EXITED
    stage.agent.plant("")
    client = stage.agent.client
    client.remove(container_id)
    # Its identity was in use until now.
    config = cri_pb2.PodSandboxConfig()
    request = cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=sandbox_id)
    config.metadata.CopyFrom(client.call("PodSandboxStatus", request).status.metadata)
    client.create(sandbox_id, container_config("main", "true"), config)
