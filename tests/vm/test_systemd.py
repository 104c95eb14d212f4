"""The systemd cgroup driver where systemd is init: slices, scopes and their ends."""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.conformance.support import SLEEP, Pod, refused
from tests.support.agent import AgentProcess, running_agent, wait_for
from tests.support.pods import container_config, sandbox_config
from tests.vm.cgroup_files import CGROUPS, cgroup_of, content, pod_folder, properties

MIB = 1 << 20

if not Path("/run/systemd/system").is_dir():
    pytest.skip("needs systemd as init: make test-vm runs this", allow_module_level=True)


@pytest.fixture(scope="module", params=["crun", "runc"])
def systemd_agent(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, busybox: Path
) -> Iterator[AgentProcess]:
    with running_agent(tmp_path_factory.mktemp("agent"), busybox, runtime=request.param) as agent:
        yield agent


@pytest.fixture
def kubelets_slice() -> Iterator[str]:
    """A pod's slice as kubelet makes it, named with its path as kubelet does."""
    stem = f"podkeeltest{secrets.token_hex(3)}"
    name = f"{stem}-besteffort-pod1.slice"
    subprocess.run(["systemctl", "start", name], check=True)
    yield f"/{stem}.slice/{stem}-besteffort.slice/{name}"
    for unit in (name, f"{stem}-besteffort.slice", f"{stem}.slice"):
        subprocess.run(["systemctl", "stop", unit], check=True)


def test_the_driver_is_reported(systemd_agent: AgentProcess) -> None:
    answer = systemd_agent.client.call("RuntimeConfig", cri_pb2.RuntimeConfigRequest())
    assert answer.linux.cgroup_driver == cri_pb2.SYSTEMD


def test_a_container_is_a_scope_in_kubelets_slice(systemd_agent: AgentProcess, kubelets_slice: str) -> None:
    client = systemd_agent.client
    config = sandbox_config(systemd_agent)
    config.linux.cgroup_parent = kubelets_slice
    pod = Pod.run(systemd_agent, config)
    wanted = container_config("main", *SLEEP)
    wanted.linux.resources.CopyFrom(
        cri_pb2.LinuxContainerResources(
            memory_limit_in_bytes=64 * MIB, cpu_quota=50000, cpu_period=100000, cpu_shares=1024
        )
    )
    container_id = pod.start(wanted)
    unit = f"podkeel-{container_id}.scope"
    folder, parent = cgroup_of(client, container_id), pod_folder(client, pod.id)
    assert parent == CGROUPS / kubelets_slice.lstrip("/")
    assert parent / unit in (folder, folder.parent)
    slice_name = kubelets_slice.rpartition("/")[2]
    told = properties(unit, "Slice", "ActiveState", "Delegate", "TasksMax")
    assert told == {"Slice": slice_name, "ActiveState": "active", "Delegate": "yes", "TasksMax": "infinity"}
    assert (content(folder, "memory.max"), content(folder, "cpu.max")) == (str(64 * MIB), "50000 100000")
    pods = client.call("PodSandboxStats", cri_pb2.PodSandboxStatsRequest(pod_sandbox_id=pod.id)).stats.linux
    assert pods.memory.usage_bytes.value == pytest.approx(int(content(parent, "memory.current")), abs=4 * MIB)
    change = cri_pb2.LinuxContainerResources(memory_limit_in_bytes=96 * MIB, cpu_quota=70000, cpu_period=100000)
    client.call(
        "UpdateContainerResources",
        cri_pb2.UpdateContainerResourcesRequest(container_id=container_id, linux=change),
    )
    assert content(folder, "memory.max") == str(96 * MIB)
    # systemd would remove settings that it does not know when it writes the limits of the scope again.
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    subprocess.run(["systemctl", "set-property", "--runtime", slice_name, "IOAccounting=yes"], check=True)
    assert (content(folder, "memory.max"), content(folder, "cpu.max")) == (str(96 * MIB), "70000 100000")
    client.stop_sandbox(pod.id)
    client.remove_sandbox(pod.id)
    assert not (parent / unit).exists()
    wait_for(lambda: properties(unit, "LoadState", "ActiveState")["ActiveState"] == "inactive", what="the scope's end")
    assert properties(slice_name, "ActiveState")["ActiveState"] == "active"
    assert parent.is_dir()


def test_a_pod_without_a_parent_has_its_own_slice_and_removes_it(systemd_agent: AgentProcess) -> None:
    client = systemd_agent.client
    pod = Pod.run(systemd_agent, sandbox_config(systemd_agent))
    folder, parent = cgroup_of(client, pod.sleeping()), pod_folder(client, pod.id)
    name = f"{systemd_agent.cgroup_parent.strip('/')}-{pod.id}.slice"
    assert parent.name == name
    assert parent in folder.parents
    assert properties(name, "ActiveState")["ActiveState"] == "active"
    client.stop_sandbox(pod.id)
    assert properties(name, "ActiveState")["ActiveState"] == "inactive"
    assert not parent.exists()


def test_slices_of_a_killed_agent_are_stopped(systemd_agent: AgentProcess) -> None:
    own_id = (systemd_agent.data / "agent-id").read_text().strip()
    name = f"{systemd_agent.cgroup_parent.strip('/')}-{'e' * 52}{own_id}.slice"
    subprocess.run(["systemctl", "start", name], check=True)
    assert systemd_agent.client.findings() == [f"cgroup {name} belongs to no live sandbox"]
    systemd_agent.restart()
    assert systemd_agent.client.findings() == []
    assert properties(name, "ActiveState")["ActiveState"] == "inactive"


def test_a_parent_for_the_other_driver_is_refused(systemd_agent: AgentProcess) -> None:
    config = sandbox_config(systemd_agent)
    config.linux.cgroup_parent = "/kubepods/pod1"
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "the systemd driver takes a slice"):
        systemd_agent.client.run_sandbox(config)
