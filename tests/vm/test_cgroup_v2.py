"""Containers on cgroup v2: limits, namespaces, out-of-memory kills, statistics and ends, with either cgroup driver."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.conformance.support import SLEEP, Pod, exited, refused
from tests.support.agent import AgentProcess, wait_for
from tests.support.pods import container_config, sandbox_config, wait_for_log
from tests.vm.cgroup_files import CGROUPS, cgroup_of, content, information, pod_folder

MIB = 1 << 20
Limits = cri_pb2.LinuxContainerResources


def limited(limits: Limits, *command: str) -> cri_pb2.ContainerConfig:
    config = container_config("main", *command)
    config.linux.resources.CopyFrom(limits)
    return config


def update(pod: Pod, container_id: str, limits: Limits) -> None:
    request = cri_pb2.UpdateContainerResourcesRequest(container_id=container_id, linux=limits)
    pod.agent.client.call("UpdateContainerResources", request)


def test_limits_are_in_the_kernel(pod: Pod) -> None:
    limits = Limits(cpu_shares=512, cpu_quota=50000, cpu_period=100000, cpuset_cpus="0", cpuset_mems="0")
    limits.memory_limit_in_bytes = limits.memory_swap_limit_in_bytes = 64 * MIB
    limits.unified.update({"memory.high": str(48 * MIB), "memory.oom.group": "1", "pids.max": "77"})
    client = pod.agent.client
    container_id = pod.start(limited(limits, *SLEEP))
    folder = cgroup_of(client, container_id)
    assert folder == CGROUPS / information(client, container_id)["cgroup"].lstrip("/")
    names = ("cpu.max", "cpuset.cpus", "memory.max", "memory.high", "memory.oom.group", "pids.max")
    assert [content(folder, name) for name in names] == [
        "50000 100000",
        "0",
        str(64 * MIB),
        str(48 * MIB),
        "1",
        "77",
    ]
    # Nothing above it but what the pod was given: no limit of systemd's own either.
    assert [content(folder.parent, name) for name in ("memory.max", "pids.max")] == ["max", "max"]
    # The kernel has weights where CRI has shares: 1024 shares are 39 or, by the formula of newer runtimes, 100.
    assert int(content(folder, "cpu.weight")) in (20, 59)
    if (folder / "memory.swap.max").exists():
        assert content(folder, "memory.swap.max") == "0"
    assert client.status(container_id).resources.linux == limits


def test_tasks_are_unlimited_by_default(pod: Pod) -> None:
    folder = cgroup_of(pod.agent.client, pod.sleeping())
    assert [content(group, "pids.max") for group in (folder, folder.parent)] == ["max", "max"]


def test_huge_pages_are_limited(pod: Pod) -> None:
    limits = Limits(hugepage_limits=[cri_pb2.HugepageLimit(page_size="2MB", limit=4 * MIB)])
    container_id = pod.start(limited(limits, *SLEEP))
    assert content(cgroup_of(pod.agent.client, container_id), "hugetlb.2MB.max") == str(4 * MIB)


def test_limits_are_changed_with_unified_keys_too(pod: Pod) -> None:
    first = Limits(memory_limit_in_bytes=64 * MIB, cpu_quota=50000, cpu_period=100000)
    container_id = pod.start(limited(first, *SLEEP))
    folder = cgroup_of(pod.agent.client, container_id)
    second = Limits(memory_limit_in_bytes=96 * MIB, cpu_shares=2048)
    second.unified["memory.high"] = str(80 * MIB)
    update(pod, container_id, second)
    assert content(folder, "memory.max") == str(96 * MIB)
    assert content(folder, "memory.high") == str(80 * MIB)
    assert content(folder, "cpu.max") == "50000 100000"
    assert int(content(folder, "cpu.weight")) in (79, 174)
    shown = pod.agent.client.status(container_id).resources.linux
    assert dict(shown.unified) == {"memory.high": str(80 * MIB)}
    assert (shown.cpu_shares, shown.cpu_quota) == (2048, 50000)


def test_unified_keys_that_the_kernel_refuses_change_nothing(pod: Pod) -> None:
    container_id = pod.start(limited(Limits(memory_limit_in_bytes=64 * MIB), *SLEEP))
    folder = cgroup_of(pod.agent.client, container_id)
    wrong = Limits(memory_limit_in_bytes=128 * MIB)
    wrong.unified.update({"memory.no_such_file": "1", "memory.high": str(48 * MIB), "pids.max": "99"})
    with refused(grpc.StatusCode.INTERNAL, "memory.no_such_file"):
        update(pod, container_id, wrong)
    assert [content(folder, name) for name in ("memory.max", "memory.high", "pids.max")] == [
        str(64 * MIB),
        "max",
        "max",
    ]
    assert not pod.agent.client.status(container_id).resources.linux.unified


def test_a_container_sees_only_its_own_cgroup(pod: Pod) -> None:
    container_id = pod.start(limited(Limits(memory_limit_in_bytes=64 * MIB), *SLEEP))
    client = pod.agent.client
    assert client.output(container_id, "cat", "/proc/self/cgroup") == "0::/\n"
    assert client.output(container_id, "cat", "/sys/fs/cgroup/memory.max") == f"{64 * MIB}\n"
    assert "ro" in client.output(container_id, "sh", "-c", "grep ' /sys/fs/cgroup ' /proc/mounts").split()[3].split(",")
    assert client.exec(container_id, "mkdir", "/sys/fs/cgroup/own").exit_code != 0


def test_a_privileged_container_has_a_writable_cgroup(privileged_pod: Pod) -> None:
    config = container_config("main", *SLEEP)
    config.linux.security_context.privileged = True
    container_id = privileged_pod.start(config)
    client = privileged_pod.agent.client
    own = Path("/proc/self/ns/cgroup").readlink()
    assert client.output(container_id, "readlink", "/proc/self/ns/cgroup").strip() == str(own)
    folder = cgroup_of(client, container_id).relative_to(CGROUPS)
    client.output(container_id, "mkdir", f"/sys/fs/cgroup/{folder}/own")
    assert (CGROUPS / folder / "own").is_dir()


# Room enough for runc to start in: with less, the kernel turns its pages over for minutes before it kills anything.
HOG_LIMIT = 64 * MIB


@pytest.mark.parametrize("hog", ["exec tail /dev/zero", "tail /dev/zero; exit 137", "tail /dev/zero & wait $!"])
def test_out_of_memory_kills_are_reported(pod: Pod, hog: str) -> None:
    status = exited(pod.agent, pod.start(limited(Limits(memory_limit_in_bytes=HOG_LIMIT), "sh", "-c", hog)))
    assert (status.reason, status.exit_code) == ("OOMKilled", 137)


def test_a_whole_group_is_killed_where_that_is_asked(pod: Pod) -> None:
    limits = Limits(memory_limit_in_bytes=HOG_LIMIT)
    limits.unified["memory.oom.group"] = "1"
    status = exited(pod.agent, pod.start(limited(limits, "sh", "-c", "tail /dev/zero; sleep 1000")))
    assert (status.reason, status.exit_code) == ("OOMKilled", 137)


def test_other_ends_are_no_out_of_memory_kills(pod: Pod) -> None:
    status = exited(pod.agent, pod.start(limited(Limits(memory_limit_in_bytes=64 * MIB), "sh", "-c", "kill -9 $$")))
    assert (status.reason, status.exit_code) in (("Error", 137), ("Completed", 0))


def test_statistics_of_container_and_pod(pod: Pod) -> None:
    script = "dd if=/dev/zero of=/dev/null bs=1M count=300; echo ready; exec sleep 1000"
    container_id = pod.start(limited(Limits(memory_limit_in_bytes=64 * MIB), "sh", "-c", script))
    client = pod.agent.client
    wait_for_log(client, container_id)
    folder = cgroup_of(client, container_id)
    stats = client.call("ContainerStats", cri_pb2.ContainerStatsRequest(container_id=container_id)).stats
    assert stats.cpu.usage_core_nano_seconds.value > 0
    current = int(content(folder, "memory.current"))
    assert stats.memory.usage_bytes.value == pytest.approx(current, abs=4 * MIB)
    assert 0 < stats.memory.working_set_bytes.value <= stats.memory.usage_bytes.value
    assert stats.memory.available_bytes.value == 64 * MIB - stats.memory.working_set_bytes.value
    assert stats.cpu.HasField("psi")
    assert stats.memory.HasField("psi")
    assert stats.io.HasField("psi")
    whole = client.call("PodSandboxStats", cri_pb2.PodSandboxStatsRequest(pod_sandbox_id=pod.id)).stats.linux
    assert whole.cpu.usage_core_nano_seconds.value >= stats.cpu.usage_core_nano_seconds.value
    assert whole.memory.usage_bytes.value >= stats.memory.rss_bytes.value
    assert whole.process.process_count.value == 1
    assert [container.attributes.id for container in whole.containers] == [container_id]


def test_every_process_of_a_shared_pid_namespace_goes(agent: AgentProcess) -> None:
    config = sandbox_config(agent)
    config.linux.security_context.namespace_options.pid = cri_pb2.NODE
    pod = Pod.run(agent, config)
    wanted = container_config("main", "sh", "-c", "setsid sleep 1001 & setsid sleep 1002 & echo ready; exec sleep 1000")
    wanted.linux.security_context.namespace_options.pid = cri_pb2.NODE
    container_id = pod.start(wanted)
    wait_for_log(agent.client, container_id)
    folder = cgroup_of(agent.client, container_id)
    pids = content(folder, "cgroup.procs").split()
    assert len(pids) == 3
    agent.client.stop(container_id)
    assert not any(Path(f"/proc/{pid}/cmdline").exists() and _is_sleep(pid) for pid in pids)
    wait_for(lambda: not folder.exists(), what="the cgroup's end")


def _is_sleep(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sleep")
    except OSError:
        return False


def test_cgroups_that_a_container_made_go_with_it(privileged_pod: Pod) -> None:
    config = container_config(
        "main",
        "sh",
        "-c",
        "own=/sys/fs/cgroup$(sed s/0::// /proc/self/cgroup); mkdir -p $own/below/deeper; setsid sleep 1001 & "
        "echo $! > $own/below/deeper/cgroup.procs; echo ready; exec sleep 1000",
    )
    config.linux.security_context.privileged = True
    container_id = privileged_pod.start(config)
    client = privileged_pod.agent.client
    wait_for_log(client, container_id)
    folder = cgroup_of(client, container_id)
    assert content(folder / "below/deeper", "cgroup.procs")
    client.stop(container_id)
    client.remove(container_id)
    assert not folder.exists()


def test_devices_are_denied_that_were_not_given(pod: Pod) -> None:
    config = container_config("main", *SLEEP)
    config.linux.security_context.capabilities.add_capabilities.append("MKNOD")
    container_id = pod.start(config)
    client = pod.agent.client
    assert client.output(container_id, "head", "-c", "1", "/dev/zero") == "\0"
    answer = client.exec(container_id, "sh", "-c", "mknod /tmp/disk b 254 0 && head -c 1 /tmp/disk")
    assert answer.exit_code != 0
    assert b"Operation not permitted" in answer.stderr


def test_nothing_of_a_pod_stays_in_the_cgroup_tree(agent: AgentProcess) -> None:
    pod = Pod.run(agent, sandbox_config(agent))
    folder = cgroup_of(agent.client, pod.sleeping())
    parent = pod_folder(agent.client, pod.id)
    assert parent in folder.parents
    assert pod.id in parent.name
    agent.client.stop_sandbox(pod.id)
    assert not folder.exists()
    assert not parent.exists()


def test_containers_are_found_again_after_a_crash(agent: AgentProcess) -> None:
    pod = Pod.run(agent, sandbox_config(agent))
    running, ending = pod.sleeping("running"), pod.sleeping("ending")
    pid = information(agent.client, ending)["pid"]
    folder = cgroup_of(agent.client, running)
    agent.kill()
    os.kill(pid, signal.SIGKILL)
    agent.start()
    assert agent.client.status(running).state == cri_pb2.CONTAINER_RUNNING
    assert cgroup_of(agent.client, running) == folder
    assert exited(agent, ending).exit_code == 137
    agent.client.stop_sandbox(pod.id)
    assert not folder.exists()
