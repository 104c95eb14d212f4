"""What plugins change reaches the container, and is named where people look."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest

from proto.nri.v1alpha1 import nri_pb2
from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess, wait_for
from tests.support.nri import Recorder, connected
from tests.support.pods import container_config, run_container, sandbox_config


def answering(**adjust: Any) -> Any:
    """A CreateContainer handler that adjusts the container in this way."""

    def create(_request: nri_pb2.CreateContainerRequest) -> nri_pb2.CreateContainerResponse:
        return nri_pb2.CreateContainerResponse(adjust=nri_pb2.ContainerAdjustment(**adjust))

    return create


def test_adjustments_are_seen_from_inside(agent: AgentProcess, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("from the node")
    mount = nri_pb2.Mount(destination="/given", type="bind", source=str(tmp_path), options=["rbind", "ro"])
    create = answering(
        env=[nri_pb2.KeyValue(key="GIVEN", value="yes")],
        mounts=[mount],
        rlimits=[nri_pb2.POSIXRlimit(type="RLIMIT_NOFILE", soft=123, hard=456)],
        linux=nri_pb2.LinuxContainerAdjustment(
            devices=[nri_pb2.LinuxDevice(path="/dev/given", type="c", major=1, minor=5)],
            resources=nri_pb2.LinuxResources(memory=nri_pb2.LinuxMemory(limit=nri_pb2.OptionalInt64(value=96 << 20))),
        ),
    )
    with connected(Recorder(agent.nri_socket, acting={"CreateContainer": create})):
        _, container_id = run_container(agent, "sleep", "1000")
    script = "echo $GIVEN; cat /given/file; echo; ulimit -n; head -c 2 /dev/given | wc -c"
    assert agent.client.output(container_id, "sh", "-c", script).split("\n")[:4] == ["yes", "from the node", "123", "2"]
    assert agent.client.status(container_id).resources.linux.memory_limit_in_bytes == 96 << 20
    answer = agent.client.call(
        "ContainerStatus", cri_pb2.ContainerStatusRequest(container_id=container_id, verbose=True)
    )
    assert "10-recorder" in answer.info["info"]


def test_each_plugin_has_a_stage_and_sees_the_changes_of_those_before(agent: AgentProcess) -> None:
    first = Recorder(
        agent.nri_socket, "10", "first", {"CreateContainer": answering(env=[nri_pb2.KeyValue(key="A", value="1")])}
    )
    second = Recorder(agent.nri_socket, "20", "second")
    with connected(second), connected(first):
        _, container_id = run_container(agent, "sleep", "1000")
    assert "A=1" in second.last("CreateContainer").container.env
    assert "A=1" in second.last("StartContainer").container.env
    answer = agent.client.call(
        "ContainerStatus", cri_pb2.ContainerStatusRequest(container_id=container_id, verbose=True)
    )
    assert '"nri:10-first"' in answer.info["info"]
    assert '"nri:20-second"' in answer.info["info"]


def test_a_plugin_changes_an_update_and_other_containers(agent: AgentProcess) -> None:
    _, other = run_container(agent, "sleep", "1000")

    def update(request: nri_pb2.UpdateContainerRequest) -> nri_pb2.UpdateContainerResponse:
        answer = nri_pb2.UpdateContainerResponse()
        own = answer.update.add(container_id=request.container.id)
        own.linux.resources.memory.limit.value = request.linux_resources.memory.limit.value * 2
        answer.update.add(container_id=other).linux.resources.cpu.shares.value = 512
        answer.update.add(container_id="missing", ignore_failure=True).linux.resources.cpu.shares.value = 2
        return answer

    with connected(Recorder(agent.nri_socket, acting={"UpdateContainer": update})) as plugin:
        _, container_id = run_container(agent, "sleep", "1000")
        limits = cri_pb2.LinuxContainerResources(memory_limit_in_bytes=64 << 20)
        request = cri_pb2.UpdateContainerResourcesRequest(container_id=container_id, linux=limits)
        agent.client.call("UpdateContainerResources", request)
        assert agent.client.status(container_id).resources.linux.memory_limit_in_bytes == 128 << 20
        assert agent.client.status(other).resources.linux.cpu_shares == 512
        told = plugin.last("PostUpdateContainer").container.linux.resources
        assert told.memory.limit.value == 128 << 20


def test_a_plugin_updates_and_evicts_at_any_time(agent: AgentProcess) -> None:
    _, kept = run_container(agent, "sleep", "1000")
    _, evicted = run_container(agent, "sleep", "1000")
    request = nri_pb2.UpdateContainersRequest()
    request.update.add(container_id=kept).linux.resources.cpu.shares.value = 256
    request.update.add(container_id="missing").linux.resources.cpu.shares.value = 256
    request.evict.add(container_id=evicted, reason="room is needed")
    with connected(Recorder(agent.nri_socket)) as plugin:
        answer = plugin.update_containers(request)
        assert [update.container_id for update in answer.failed] == ["missing"]
        assert plugin.events_of(kept) == []
        wait_for(lambda: plugin.events_of(evicted) == ["StopContainer"])
    assert agent.client.status(kept).resources.linux.cpu_shares == 256
    status = agent.client.status(evicted)
    assert (status.state, status.reason) == (cri_pb2.CONTAINER_EXITED, "Evicted")
    assert status.message == "evicted by NRI plugin 10-recorder: room is needed"


def test_two_containers_that_end_update_each_other(agent: AgentProcess) -> None:
    """Neither waits for the lock that the other's end holds."""
    pods = [run_container(agent, "sleep", "1000") for _ in range(4)]
    ids = [container_id for _, container_id in pods]

    def stop(request: nri_pb2.StopContainerRequest) -> nri_pb2.StopContainerResponse:
        answer = nri_pb2.StopContainerResponse()
        for other in ids:
            if other != request.container.id:
                answer.update.add(container_id=other).linux.resources.cpu.shares.value = 300
        return answer

    with connected(Recorder(agent.nri_socket, acting={"StopContainer": stop})) as plugin:
        calls = [
            agent.client.future("StopContainer", cri_pb2.StopContainerRequest(container_id=one)) for one in ids[:3]
        ]
        for call in calls:
            call.result(20)
        wait_for(lambda: agent.client.status(ids[3]).resources.linux.cpu_shares == 300)
        assert [plugin.events_of(one) for one in ids] == [["StopContainer"]] * 3 + [[]]


def test_a_conflict_names_both_plugins_and_leaves_nothing(agent: AgentProcess) -> None:
    create = answering(env=[nri_pb2.KeyValue(key="SAME", value="x")])
    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox)
    with (
        connected(Recorder(agent.nri_socket, "10", "one", {"CreateContainer": create})) as one,
        connected(Recorder(agent.nri_socket, "20", "two", {"CreateContainer": create})),
    ):
        with pytest.raises(grpc.RpcError, match="NRI plugins 10-one and 20-two both set Env 'SAME'"):
            agent.client.create(sandbox_id, container_config("main", "sleep", "9"), sandbox)
        refused = one.told[-1][1]
        wait_for(lambda: one.events_of(refused)[-1] == "RemoveContainer")
    answer = agent.client.call("ListContainers", cri_pb2.ListContainersRequest())
    assert not answer.containers


def test_the_status_of_the_node_lists_plugins_and_their_calls(agent: AgentProcess) -> None:
    with connected(Recorder(agent.nri_socket, "42", "listed")):
        run_container(agent, "sleep", "1000")
        answer = agent.client.call("Status", cri_pb2.StatusRequest(verbose=True))
        command = agent.command("nri", "--socket", agent.address)
        table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        plugins = {plugin["plugin"]: plugin for plugin in json.loads(answer.info["podkeel"])["nriPlugins"]}
    assert plugins["42-listed"]["calls"]["CreateContainer"] == 1
    assert "START_CONTAINER" in plugins["42-listed"]["events"]
    line = next(line for line in table.splitlines() if line.startswith("42-listed"))
    assert line.split()[1:3] == ["connected", "14"]


def test_a_pods_resources_are_shown_as_they_were_accepted(agent: AgentProcess) -> None:
    def refuse(_request: nri_pb2.UpdatePodSandboxRequest) -> None:
        raise ValueError("too much")

    def shown() -> dict[str, int]:
        request = cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=sandbox_id, verbose=True)
        info = json.loads(agent.client.call("PodSandboxStatus", request).info["info"])
        linux: dict[str, int] = info["resources"]["linux"]
        return linux

    sandbox_id = agent.client.run_sandbox(sandbox_config(agent))
    limits = cri_pb2.LinuxContainerResources(cpu_shares=512, memory_limit_in_bytes=64 << 20)
    request = cri_pb2.UpdatePodSandboxResourcesRequest(pod_sandbox_id=sandbox_id, resources=limits)
    with (
        connected(Recorder(agent.nri_socket, acting={"UpdatePodSandbox": refuse})),
        pytest.raises(grpc.RpcError, match="too much"),
    ):
        agent.client.call("UpdatePodSandboxResources", request)
    assert shown() == {}
    agent.client.call("UpdatePodSandboxResources", request)
    assert shown() == {"cpu_shares": 512, "memory_limit_in_bytes": 64 << 20}
