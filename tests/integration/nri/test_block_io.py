"""Classes of block I/O that plugins give to containers: the limits are in the cgroups, under both OCI runtimes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from proto.nri.v1alpha1 import nri_pb2
from proto.runtime.v1 import cri_pb2
from tests.integration.nri.test_every_field import V1, V2, create, information
from tests.support.agent import AgentProcess
from tests.support.nri import Recorder, connected
from tests.support.pods import sandbox_config

DISK = next(
    (disk for block in sorted(Path("/sys/block").iterdir()) if (disk := Path("/dev") / block.name).is_block_device()),
    None,
)
pytestmark = pytest.mark.skipif(DISK is None, reason="this node has no disk")


@pytest.fixture(scope="module")
def shared_agent(tmp_path_factory: pytest.TempPathFactory, busybox: Path) -> Iterator[AgentProcess]:
    made = AgentProcess(folder := tmp_path_factory.mktemp("block-io"))
    configuration, classes = folder / "config.toml", folder / "classes.yaml"
    named = configuration.read_text().replace("[nri]\n", f'[nri]\nblockio_config_file = "{classes}"\n')
    configuration.write_text(named)
    try:
        made.start()
        made.import_busybox(busybox)
        yield made
    finally:
        made.reset()


def write_classes(agent: AgentProcess, text: str) -> None:
    """Take other classes; the agent reads them again for each container."""
    (agent.folder / "classes.yaml").write_text(text)


def of_class(name: str) -> nri_pb2.ContainerAdjustment:
    adjust = nri_pb2.ContainerAdjustment()
    adjust.linux.resources.blockio_class.value = name
    return adjust


def limits(agent: AgentProcess, container_id: str) -> list[str]:
    """Bytes read and operations written a second on the disk, as the kernel knows them."""
    cgroup = str(information(agent, container_id)["cgroup"]).lstrip("/")
    if V2:
        fields = dict(field.split("=") for field in (V1 / cgroup / "io.max").read_text().split()[1:])
        return [fields["rbps"], fields["wiops"]]
    files = ("blkio.throttle.read_bps_device", "blkio.throttle.write_iops_device")
    return [(V1 / "blkio" / cgroup / file).read_text().split()[-1] for file in files]


@pytest.mark.parametrize("handler", ["crun", "runc"])
def test_a_class_limits_the_container_on_the_disks_that_match(agent: AgentProcess, handler: str) -> None:
    assert DISK is not None
    pattern = f"{DISK.parent}/{DISK.name[:-1]}[{DISK.name[-1]}]"
    settings = f"[{{Devices: [/dev/null, '{pattern}'], ThrottleReadBps: 50M, ThrottleWriteIOPS: 1k}}]"
    write_classes(agent, f"Classes:\n  slow: {settings}\n")
    sandbox_id = agent.client.run_sandbox(sandbox_config(agent), handler)
    container_id = create(agent, sandbox_id, of_class("slow"))
    assert limits(agent, container_id) == ["50000000", "1000"]
    assert information(agent, container_id)["changedBy"] == {"BlockioClass": "10-recorder"}
    write_classes(agent, f"classes:\n  slow: [{{devices: ['{DISK}'], throttlereadbps: 1Mi, throttlewriteiops: 7}}]\n")
    assert limits(agent, create(agent, sandbox_id, of_class("slow"), "second")) == [str(1 << 20), "7"]
    agent.restart()
    assert limits(agent, container_id) == ["50000000", "1000"]


def test_a_weight_is_in_the_cgroup(agent: AgentProcess) -> None:
    if V2 and not [*V1.glob("*/io.weight"), *V1.glob("*/io.bfq.weight")]:
        pytest.skip("this kernel has no weights of block I/O")
    write_classes(agent, "Classes: {low: [{Weight: 80}]}")
    sandbox_id = agent.client.run_sandbox(sandbox_config(agent), "runc")
    container_id = create(agent, sandbox_id, of_class("low"))
    cgroup = str(information(agent, container_id)["cgroup"]).lstrip("/")
    files = [V1 / "blkio" / cgroup / "blkio.bfq.weight", V1 / cgroup / "io.bfq.weight", V1 / cgroup / "io.weight"]
    assert {file.read_text().split()[-1] for file in files if file.exists()} & {"80", str(1 + 70 * 9999 // 990)}


def rates(agent: AgentProcess, container_id: str) -> dict[str, str]:
    """All limits of a container on disks, by their names in cgroup v2."""
    cgroup = str(information(agent, container_id)["cgroup"]).lstrip("/")
    if V2:
        found = dict(field.split("=") for field in (V1 / cgroup / "io.max").read_text().split()[1:])
        return {name: value for name, value in found.items() if value != "max"}
    files = {name: f"blkio.throttle.{file}_device" for name, file in V1_NAMES.items()}
    words = {name: (V1 / "blkio" / cgroup / file).read_text().split() for name, file in files.items()}
    return {name: given[-1] for name, given in words.items() if given}


V1_NAMES = {"rbps": "read_bps", "wbps": "write_bps", "riops": "read_iops", "wiops": "write_iops"}


@pytest.mark.parametrize("handler", ["crun", "runc"])
def test_an_update_replaces_the_class_of_a_container(agent: AgentProcess, handler: str) -> None:
    slow = f"[{{Devices: ['{DISK}'], ThrottleReadBps: 50M, ThrottleWriteIOPS: 1k}}]"
    fast = f"[{{Devices: ['{DISK}'], ThrottleReadBps: 1Mi, ThrottleWriteBps: 2Mi}}]"
    write_classes(agent, f"Classes:\n  slow: {slow}\n  fast: {fast}\n")
    sandbox_id = agent.client.run_sandbox(sandbox_config(agent), handler)
    container_id = create(agent, sandbox_id, of_class("slow"))
    with connected(Recorder(agent.nri_socket, "20", "later")) as plugin:

        def failed(name: str, **others: int) -> list[str]:
            request = nri_pb2.UpdateContainersRequest()
            resources = request.update.add(container_id=container_id).linux.resources
            resources.blockio_class.value = name
            for field, value in others.items():
                getattr(resources.cpu, field).value = value
            return [one.container_id for one in plugin.update_containers(request).failed]

        assert failed("fast", shares=300) == []
        assert rates(agent, container_id) == {"rbps": str(1 << 20), "wbps": str(2 << 20)}
        assert information(agent, container_id)["changedBy"]["BlockioClass"] == "20-later"
        assert failed("gold", shares=500) == [container_id]
        assert "NRI plugin 20-later: BlockioClass gold: " in agent.log.read_text()
        limits_of_client = cri_pb2.LinuxContainerResources(memory_limit_in_bytes=64 << 20)
        update = cri_pb2.UpdateContainerResourcesRequest(container_id=container_id, linux=limits_of_client)
        agent.client.call("UpdateContainerResources", update)
        assert rates(agent, container_id) == {"rbps": str(1 << 20), "wbps": str(2 << 20)}
        assert agent.client.status(container_id).resources.linux.cpu_shares == 300
        assert plugin.last("UpdateContainer").container.linux.resources.blockio_class.value == "fast"
        assert failed("") == []
        assert rates(agent, container_id) == {}


def test_an_update_that_fails_leaves_the_limits_of_before(agent: AgentProcess) -> None:
    low = f"[{{Devices: ['{DISK}'], Weight: 80}}]"
    write_classes(agent, f"Classes: {{slow: [{{Devices: ['{DISK}'], ThrottleReadBps: 50M}}], low: {low}}}")
    sandbox_id = agent.client.run_sandbox(sandbox_config(agent))
    container_id = create(agent, sandbox_id, of_class("slow"))
    assert DISK is not None
    if "[bfq]" in Path(f"/sys/block/{DISK.name}/queue/scheduler").read_text():
        pytest.skip(f"{DISK} takes weights, so nothing fails")

    def change(_request: Any) -> nri_pb2.UpdateContainerResponse:
        answer = nri_pb2.UpdateContainerResponse()
        answer.update.add(container_id=container_id).linux.resources.blockio_class.value = "low"
        return answer

    with connected(Recorder(agent.nri_socket, acting={"UpdateContainer": change})):
        limits_of_client = cri_pb2.LinuxContainerResources(cpu_shares=400)
        update = cri_pb2.UpdateContainerResourcesRequest(container_id=container_id, linux=limits_of_client)
        with pytest.raises(grpc.RpcError, match="of block I/O"):
            agent.client.call("UpdateContainerResources", update)
    assert rates(agent, container_id) == {"rbps": "50000000"}
    assert agent.client.status(container_id).resources.linux.cpu_shares == 0


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ("Classes: {other: []}", "BlockioClass gold: .*classes.yaml has no class 'gold' of block I/O: it has other"),
        ("Classes: {gold: [{Weight: 5}]}", "BlockioClass gold: .*weight 5 is out of range: use 10 to 1000"),
        ("Classes: {gold: [{Wait: 5}]}", "BlockioClass gold: .*unknown field `wait`"),
        ("Classes: {gold: [{ThrottleReadBps: 1M}]}", "BlockioClass gold: .*names no devices"),
        ("Classes: {gold: [{Devices: [/dev/x], ThrottleReadBps: fast}]}", "BlockioClass gold: .*'fast' is no quantity"),
        ("Classes: [", "BlockioClass gold: .*classes.yaml cannot be read"),
    ],
    ids=["unknown", "weight", "key", "no-devices", "quantity", "yaml"],
)
def test_a_class_that_cannot_be_refuses_the_container_by_plugin_and_field(
    agent: AgentProcess, classes: str, words: str
) -> None:
    write_classes(agent, classes)
    sandbox_id = agent.client.run_sandbox(sandbox_config(agent))
    with pytest.raises(grpc.RpcError, match=f"NRI plugin 10-recorder: {words}") as raised:
        create(agent, sandbox_id, of_class("gold"))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    (agent.folder / "classes.yaml").unlink()
    with pytest.raises(grpc.RpcError, match=r"classes.yaml cannot be read: .*No such file"):
        create(agent, sandbox_id, of_class("gold"))
    create(agent, sandbox_id, nri_pb2.ContainerAdjustment())
