"""Every field that plugins may change, under both OCI runtimes: from inside, in cgroup files, after a restart."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest

from host.scheduling import io_priority
from proto.nri.v1alpha1 import nri_pb2
from proto.runtime.v1 import cri_pb2
from tests.integration.conformance.support import SLEEP, refused
from tests.support.agent import AgentProcess, wait_for
from tests.support.nri import Recorder, connected
from tests.support.pods import container_config, sandbox_config

V1 = Path("/sys/fs/cgroup")
V2 = (V1 / "cgroup.controllers").exists()
Linux = nri_pb2.LinuxContainerAdjustment
Resources = nri_pb2.LinuxResources


def optional(value: int) -> nri_pb2.OptionalInt64:
    return nri_pb2.OptionalInt64(value=value)


def adjusting(adjust: nri_pb2.ContainerAdjustment) -> Any:
    return {"CreateContainer": lambda _: nri_pb2.CreateContainerResponse(adjust=adjust)}


@pytest.fixture(params=["crun", "runc"])
def handler(request: pytest.FixtureRequest, agent: AgentProcess) -> str:
    handlers = agent.client.call("Status", cri_pb2.StatusRequest()).runtime_handlers
    if request.param not in [handler.name for handler in handlers]:
        pytest.skip(f"{request.param} does not work here")
    return str(request.param)


@pytest.fixture
def sandbox_id(agent: AgentProcess, handler: str) -> str:
    return agent.client.run_sandbox(sandbox_config(agent), handler)


def create(
    agent: AgentProcess, sandbox_id: str, adjust: nri_pb2.ContainerAdjustment, name: str = "main", **fields: Any
) -> str:
    """Create and start a container that a plugin adjusts."""
    config = container_config(name, *SLEEP)
    config.MergeFrom(cri_pb2.ContainerConfig(**fields))
    with connected(Recorder(agent.nri_socket, acting=adjusting(adjust))):
        container_id: str = agent.client.create(sandbox_id, config, sandbox_config(agent))
        agent.client.start(container_id)
    return container_id


def information(agent: AgentProcess, container_id: str) -> dict[str, Any]:
    request = cri_pb2.ContainerStatusRequest(container_id=container_id, verbose=True)
    found: dict[str, Any] = json.loads(agent.client.call("ContainerStatus", request).info["info"])
    return found


def cgroup_file(agent: AgentProcess, container_id: str, file: str) -> str:
    hierarchy = V1 if V2 else V1 / file.partition(".")[0]
    cgroup = str(information(agent, container_id)["cgroup"])
    return (hierarchy / cgroup.lstrip("/") / file).read_text().split("\n")[0]


def update(agent: AgentProcess, container_id: str, resources: Resources) -> list[nri_pb2.ContainerUpdate]:
    """Have a plugin update a container outside of an event; returns the updates that failed."""
    request = nri_pb2.UpdateContainersRequest()
    request.update.add(container_id=container_id).linux.resources.CopyFrom(resources)
    with connected(Recorder(agent.nri_socket, "30", "updater")) as plugin:
        return list(plugin.update_containers(request).failed)


def test_commands_that_are_executed_later_get_what_plugins_set(agent: AgentProcess, sandbox_id: str) -> None:
    adjust = nri_pb2.ContainerAdjustment(
        args=["sleep", "999"],
        env=[nri_pb2.KeyValue(key="SET", value="x y"), nri_pb2.KeyValue(key="-GONE")],
        rlimits=[nri_pb2.POSIXRlimit(type="RLIMIT_STACK", hard=8 << 20, soft=4 << 20)],
        annotations={"vendor.example/set": "1"},
        linux=Linux(oom_score_adj=nri_pb2.OptionalInt(value=555), sysctl={"net.ipv4.ip_forward": "1"}),
    )
    envs = [cri_pb2.KeyValue(key="GONE", value=b"1")]
    container_id = create(agent, sandbox_id, adjust, envs=envs)
    agent.restart()
    script = "echo $SET/$GONE; ulimit -s; ulimit -Hs; cat /proc/self/oom_score_adj /proc/1/oom_score_adj; "
    script += "tr '\\0' ' ' < /proc/1/cmdline; echo; cat /proc/sys/net/ipv4/ip_forward"
    seen = agent.client.output(container_id, "sh", "-c", script).splitlines()
    assert seen == ["x y/", "4096", "8192", "555", "555", "sleep 999 ", "1"]
    told = information(agent, container_id)
    assert told["runtimeSpec"]["annotations"]["vendor.example/set"] == "1"
    assert told["changedBy"] == {
        "-Env GONE": "10-recorder",
        "Annotations vendor.example/set": "10-recorder",
        "Args": "10-recorder",
        "Env SET": "10-recorder",
        "OomScoreAdj": "10-recorder",
        "Rlimits RLIMIT_STACK": "10-recorder",
        "Sysctl net.ipv4.ip_forward": "10-recorder",
    }
    explained = agent.command("explain", "--socket", agent.address, container_id)
    printed = subprocess.run(explained, capture_output=True, text=True, check=True, timeout=30).stdout
    assert "Env SET" in printed
    assert "by 10-recorder" in printed


BOTH = Resources(
    memory=nri_pb2.LinuxMemory(reservation=optional(16 << 20), limit=optional(64 << 20)),
    cpu=nri_pb2.LinuxCPU(shares=nri_pb2.OptionalUInt64(value=333), quota=optional(20000), cpus="0"),
    pids=nri_pb2.LinuxPids(limit=55),
    hugepage_limits=[nri_pb2.HugepageLimit(page_size="2MB", limit=4 << 20)],
)
V1_LIMITS = [
    Resources(memory=nri_pb2.LinuxMemory(kernel_tcp=optional(8 << 20))),
    Resources(memory=nri_pb2.LinuxMemory(swappiness=nri_pb2.OptionalUInt64(value=7))),
    Resources(memory=nri_pb2.LinuxMemory(disable_oom_killer=nri_pb2.OptionalBool(value=True))),
]
V1_FILES = {
    "memory.soft_limit_in_bytes": str(16 << 20),
    "memory.limit_in_bytes": str(64 << 20),
    "memory.kmem.tcp.limit_in_bytes": str(8 << 20),
    "memory.swappiness": "7",
    "memory.oom_control": "oom_kill_disable 1",
    "cpu.cfs_quota_us": "20000",
    "cpuset.cpus": "0",
    "pids.max": "55",
    "hugetlb.2MB.limit_in_bytes": str(4 << 20),
}
V2_LIMITS = [Resources(unified={"memory.high": str(48 << 20), "memory.oom.group": "1"})]
V2_FILES = {
    "memory.low": str(16 << 20),
    "memory.max": str(64 << 20),
    "memory.high": str(48 << 20),
    "memory.oom.group": "1",
    "cpu.max": "20000 100000",
    "cpuset.cpus": "0",
    "pids.max": "55",
    "hugetlb.2MB.max": str(4 << 20),
}
FILES = V2_FILES if V2 else V1_FILES


def seen_limits(agent: AgentProcess, container_id: str) -> dict[str, str]:
    return {file: cgroup_file(agent, container_id, file) for file in FILES}


def has_shares(agent: AgentProcess, container_id: str, shares: int) -> bool:
    """cgroup v2 has weights where plugins have shares, by the formula of older or of newer OCI runtimes."""
    if not V2:
        return cgroup_file(agent, container_id, "cpu.shares") == str(shares)
    power = math.log2(shares)
    newer = math.ceil(10 ** ((power**2 + 125 * power) / 612 - 7 / 34))
    return cgroup_file(agent, container_id, "cpu.weight") in (str(1 + (shares - 2) * 9999 // 262142), str(newer))


def test_limits_at_creation_and_in_updates(agent: AgentProcess, sandbox_id: str) -> None:
    whole = nri_pb2.ContainerAdjustment()
    for resources in (BOTH, *(V2_LIMITS if V2 else V1_LIMITS)):
        whole.linux.resources.MergeFrom(resources)
    created = create(agent, sandbox_id, whole, "created")
    updated = create(agent, sandbox_id, nri_pb2.ContainerAdjustment(), "updated")
    assert update(agent, updated, whole.linux.resources) == []
    for container_id in (created, updated):
        assert seen_limits(agent, container_id) == FILES
        assert has_shares(agent, container_id, 333)
    # An update of the client's takes nothing from what plugins set, also after a restart.
    agent.restart()
    limits = cri_pb2.LinuxContainerResources(cpu_shares=444)
    for container_id in (created, updated):
        request = cri_pb2.UpdateContainerResourcesRequest(container_id=container_id, linux=limits)
        agent.client.call("UpdateContainerResources", request)
        assert seen_limits(agent, container_id) == FILES
        assert has_shares(agent, container_id, 444)
        changed = information(agent, container_id)["changedBy"]
        assert changed["PidsLimit"] == ("10-recorder" if container_id == created else "30-updater")
        assert "CPUShares" not in changed
    assert update(agent, created, Resources(pids=nri_pb2.LinuxPids(limit=-1))) == []
    assert cgroup_file(agent, created, "pids.max") == "max"


@pytest.mark.skipif(not V2, reason="needs cgroup v2: make test-vm runs this")
def test_limits_of_cgroup_v1_are_refused_on_v2_by_plugin_and_field(agent: AgentProcess, sandbox_id: str) -> None:
    container_id = create(agent, sandbox_id, nri_pb2.ContainerAdjustment())
    for resources, field in zip(V1_LIMITS, ("MemTCPLimit", "MemSwappiness", "MemDisableOomKiller"), strict=True):
        words = f"NRI plugin 10-recorder: {field}: cgroup v2 has no such setting"
        with refused(grpc.StatusCode.UNIMPLEMENTED, words):
            create(agent, sandbox_id, nri_pb2.ContainerAdjustment(linux=Linux(resources=resources)), "refused")
        assert [failed.container_id for failed in update(agent, container_id, resources)] == [container_id]


def test_updates_that_cannot_be_fail_alone_and_change_nothing(agent: AgentProcess, sandbox_id: str) -> None:
    container_id = create(agent, sandbox_id, nri_pb2.ContainerAdjustment())
    before = information(agent, container_id)["changedBy"]
    for wrong in (
        Resources(rdt_class=nri_pb2.OptionalString(value="gold")),
        Resources(blockio_class=nri_pb2.OptionalString(value="gold")),
        Resources(memory=nri_pb2.LinuxMemory(kernel=optional(1 << 30))),
        Resources(memory=nri_pb2.LinuxMemory(swappiness=nri_pb2.OptionalUInt64(value=1000))),
        Resources(devices=[nri_pb2.LinuxDeviceCgroup(allow=True, access="rwm")]),
        Resources(cpu=nri_pb2.LinuxCPU(cpus="4000")),
        Resources(pids=nri_pb2.LinuxPids(limit=9), cpu=nri_pb2.LinuxCPU(mems="77")),
    ):
        assert [failed.container_id for failed in update(agent, container_id, wrong)] == [container_id]
    assert information(agent, container_id)["changedBy"] == before
    assert cgroup_file(agent, container_id, "pids.max") == "max"


def test_scheduling(agent: AgentProcess, sandbox_id: str) -> None:
    linux = Linux(
        scheduler=nri_pb2.LinuxScheduler(policy=nri_pb2.SCHED_BATCH, nice=9),
        io_priority=nri_pb2.LinuxIOPriority(priority=6, **{"class": nri_pb2.IOPRIO_CLASS_BE}),
    )
    container_id = create(agent, sandbox_id, nri_pb2.ContainerAdjustment(linux=linux))
    pid = information(agent, container_id)["pid"]
    assert (os.sched_getscheduler(pid), os.getpriority(os.PRIO_PROCESS, pid)) == (os.SCHED_BATCH, 9)
    assert io_priority(pid) == (2, 6)


def test_scheduling_that_the_kernel_refuses_is_named_and_leaves_nothing(agent: AgentProcess, sandbox_id: str) -> None:
    # The time of a task of SCHED_DEADLINE must be longer than the clock's resolution.
    scheduler = nri_pb2.LinuxScheduler(policy=nri_pb2.SCHED_DEADLINE, runtime=1, deadline=1, period=1)
    adjust = nri_pb2.ContainerAdjustment(linux=Linux(scheduler=scheduler))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "10-recorder: LinuxSched"):
        create(agent, sandbox_id, adjust)
    assert not agent.client.call("ListContainers", cri_pb2.ListContainersRequest()).containers
    create(agent, sandbox_id, nri_pb2.ContainerAdjustment())


def test_a_cgroup_of_the_plugin_s_choice(agent: AgentProcess, sandbox_id: str) -> None:
    def place(request: nri_pb2.CreateContainerRequest) -> nri_pb2.CreateContainerResponse:
        answer, slice_of = nri_pb2.CreateContainerResponse(), request.container.linux.cgroups_path.split(":")[0]
        by_systemd = f"{slice_of}:chosen:{request.container.id}"
        by_path = f"{agent.cgroup_parent}/chosen/{request.container.id}"
        answer.adjust.linux.cgroups_path = by_systemd if slice_of.endswith(".slice") else by_path
        return answer

    config = container_config("main", *SLEEP)
    with connected(Recorder(agent.nri_socket, acting={"CreateContainer": place})):
        container_id = agent.client.create(sandbox_id, config, sandbox_config(agent))
    agent.client.start(container_id)
    agent.restart()
    cgroup, pid = (information(agent, container_id)[name] for name in ("cgroup", "pid"))
    assert f"/chosen-{container_id}.scope" in cgroup or cgroup == f"{agent.cgroup_parent}/chosen/{container_id}"
    assert f":{cgroup}" in Path(f"/proc/{pid}/cgroup").read_text()
    limits = cri_pb2.LinuxContainerResources(cpu_shares=99)
    request = cri_pb2.UpdateContainerResourcesRequest(container_id=container_id, linux=limits)
    agent.client.call("UpdateContainerResources", request)
    assert has_shares(agent, container_id, 99)
    assert agent.client.output(container_id, "echo", "executed") == "executed\n"
    agent.client.stop(container_id)
    agent.client.remove(container_id)
    hierarchy = V1 if V2 else V1 / "memory"
    wait_for(lambda: not (hierarchy / cgroup.lstrip("/")).exists())


@pytest.mark.parametrize("device", ["no name", "vendor.example/none=0"])
def test_a_cdi_device_that_cannot_be_added_names_the_plugin(agent: AgentProcess, sandbox_id: str, device: str) -> None:
    with pytest.raises(grpc.RpcError, match=f"NRI plugin 10-recorder: CDI device '?{device}'? ") as raised:
        create(agent, sandbox_id, nri_pb2.ContainerAdjustment(CDI_devices=[nri_pb2.CDIDevice(name=device)]))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not agent.client.call("ListContainers", cri_pb2.ListContainersRequest()).containers


@pytest.mark.parametrize(
    ("linux", "code", "words"),
    [
        (
            Linux(net_devices={"eth9": nri_pb2.LinuxNetDevice(name="x")}),
            grpc.StatusCode.UNIMPLEMENTED,
            "NRI plugin 10-recorder: LinuxNetDevices eth9: runtime handler '(crun|runc)'",
        ),
        (
            Linux(memory_policy=nri_pb2.LinuxMemoryPolicy(mode=nri_pb2.MPOL_BIND, nodes="0")),
            grpc.StatusCode.UNIMPLEMENTED,
            "NRI plugin 10-recorder: MemoryPolicy",
        ),
        # UNIMPLEMENTED with the cgroupfs driver; INVALID_ARGUMENT with systemd's, where it does not have the form.
        (Linux(cgroups_path="/elsewhere"), None, "NRI plugin 10-recorder: CgroupsPath: '/elsewhere' "),
        (Linux(sysctl={"vm.swappiness": "1"}), grpc.StatusCode.INVALID_ARGUMENT, "10-recorder: Sysctl vm.swappiness"),
        (
            Linux(sysctl={"net.no.such": "1"}),
            None,
            r"with changes of NRI plugins \(10-recorder: Sysctl net.no.such\)",
        ),
        (
            Linux(resources=Resources(cpu=nri_pb2.LinuxCPU(cpus="5000"))),
            None,
            r"with changes of NRI plugins \(10-recorder: CPUSetCPUs\)",
        ),
    ],
    ids=["net-device", "memory-policy", "cgroup", "sysctl", "missing-sysctl", "cpus"],
)
def test_what_cannot_be_done_names_plugin_and_field_and_leaves_nothing(
    agent: AgentProcess, sandbox_id: str, linux: Linux, code: grpc.StatusCode | None, words: str
) -> None:
    with pytest.raises(grpc.RpcError, match=words) as raised:
        create(agent, sandbox_id, nri_pb2.ContainerAdjustment(linux=linux))
    assert code in (None, raised.value.code())
    assert not agent.client.call("ListContainers", cri_pb2.ListContainersRequest()).containers
    create(agent, sandbox_id, nri_pb2.ContainerAdjustment())


def test_mounts_and_devices_in_a_user_namespace(agent: AgentProcess, handler: str, tmp_path: Path) -> None:
    sandbox = sandbox_config(agent)
    mapping = cri_pb2.IDMapping(container_id=0, host_id=1_000_000, length=65536)
    options = cri_pb2.UserNamespace(mode=cri_pb2.POD, uids=[mapping], gids=[mapping])
    sandbox.linux.security_context.namespace_options.userns_options.CopyFrom(options)
    sandbox_id = agent.client.run_sandbox(sandbox, handler)
    (tmp_path / "file").write_text("of the node")
    tmp_path.chmod(0o755)
    adjust = nri_pb2.ContainerAdjustment(
        mounts=[nri_pb2.Mount(destination="/given", source=str(tmp_path), type="bind", options=["rbind", "ro"])],
        linux=Linux(devices=[nri_pb2.LinuxDevice(path="/dev/given", type="c", major=1, minor=5)]),
    )
    config = container_config("main", *SLEEP)
    config.linux.security_context.namespace_options.userns_options.CopyFrom(options)
    with connected(Recorder(agent.nri_socket, acting=adjusting(adjust))):
        container_id = agent.client.create(sandbox_id, config, sandbox)
    agent.client.start(container_id)
    script = "cat /given/file; echo; stat -c '%u %t:%T' /dev/given; head -c 2 /dev/given | wc -c"
    assert agent.client.output(container_id, "sh", "-c", script).splitlines() == ["of the node", "0 1:5", "2"]
