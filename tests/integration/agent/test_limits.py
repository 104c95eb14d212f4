"""What containers may use: set in the kernel, changed as a whole or not at all."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from runtime.cgroups.tree import CgroupTree
from tests.integration.agent.hardening import Attacker, init_pid
from tests.support.agent import PATIENCE, AgentProcess, running_agent
from tests.support.pods import container_config, run_container, sandbox_config

Limits = cri_pb2.LinuxContainerResources
TREE = CgroupTree.of_host("cgroupfs")


def test_the_agent_uses_all_descriptors_that_it_may_have(tmp_path: Path, busybox: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))  # as a shell gives it
    try:
        with running_agent(tmp_path, busybox) as agent:
            assert resource.prlimit(agent.pid(), resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def made(agent: AgentProcess, handler: str, limits: Limits, *, start: bool = True) -> str:
    """A container with these limits; its id."""
    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox, handler)
    config = container_config("main", "sleep", "1000")
    config.linux.resources.CopyFrom(limits)
    container_id = agent.client.create(sandbox_id, config, sandbox)
    if start:
        agent.client.start(container_id)
    return container_id


def kernel(agent: AgentProcess, container_id: str, **names: str) -> str:
    """The content of a file of the container's cgroup, named by its version."""
    lines = Path(f"/proc/{init_pid(agent, container_id)}/cgroup").read_text().splitlines()
    name = names[f"v{TREE.version}"]
    controller = name.partition(".")[0] if TREE.version == 1 else ""
    path = next(line.split(":", 2)[2] for line in lines if controller in line.split(":", 2)[1].split(","))
    root = TREE.mounts[controller or "unified"]
    return (root / path.lstrip("/") / name).read_text().strip()


def test_commands_have_the_oom_score_adj_of_their_container(agent: AgentProcess, handler: str) -> None:
    container_id = made(agent, handler, Limits(oom_score_adj=500))
    look = ("sh", "-c", "cat /proc/self/oom_score_adj; sh -c 'cat /proc/self/oom_score_adj'")
    assert agent.client.output(container_id, *look).split() == ["500", "500"]
    update(agent, container_id, Limits(oom_score_adj=700))
    later = "700" if handler == "crun" else "500"  # runc 1.1 gives commands what the container began with
    assert agent.client.output(container_id, *look).split() == [later, later]


def test_commands_have_it_from_their_first_instruction(agent: AgentProcess, handler: str) -> None:
    """Also on a busy machine, where the agent may be preempted behind each of its steps."""
    container_id = made(agent, handler, Limits(oom_score_adj=500))
    look = cri_pb2.ExecSyncRequest(container_id=container_id, cmd=["cat", "/proc/self/oom_score_adj"])
    calls = [agent.client.future("ExecSync", look) for _ in range(100)]
    assert {call.result(timeout=60 * PATIENCE).stdout for call in calls} == {b"500\n"}


def test_commands_do_not_have_the_oom_score_adj_of_the_agent(tmp_path: Path, busybox: Path) -> None:
    with running_agent(tmp_path, busybox) as agent:
        _, container_id = run_container(agent, "sleep", "1000")
        # As under systemd, though the other way round: only who has CAP_SYS_RESOURCE can have less than it began with.
        Path(f"/proc/{agent.pid()}/oom_score_adj").write_text("300")
        assert agent.client.output(container_id, "cat", "/proc/self/oom_score_adj").strip() == "0"


def update(agent: AgentProcess, container_id: str, limits: Limits) -> None:
    request = cri_pb2.UpdateContainerResourcesRequest(container_id=container_id, linux=limits)
    agent.client.call("UpdateContainerResources", request)


def shares_of(agent: AgentProcess, container_id: str) -> str:
    return kernel(agent, container_id, v1="cpu.shares", v2="cpu.weight")


def test_one_cpu_share_is_the_kernel_s_least(agent: AgentProcess, handler: str) -> None:
    """The kernel itself takes 1 and makes it 2; OCI runtimes refuse it, or make it the most that there is."""
    least = {1: "2", 2: "1"}[TREE.version]
    assert shares_of(agent, made(agent, handler, Limits(cpu_shares=1))) == least
    container_id = made(agent, handler, Limits(cpu_shares=300))
    update(agent, container_id, Limits(cpu_shares=1))
    assert shares_of(agent, container_id) == least
    assert agent.client.status(container_id).resources.linux.cpu_shares == 1


def test_processors_and_memory_nodes(agent: AgentProcess, handler: str) -> None:
    container_id = made(agent, handler, Limits(cpuset_cpus="1" if (os.cpu_count() or 1) > 1 else "0", cpuset_mems="0"))
    assert kernel(agent, container_id, v1="cpuset.cpus", v2="cpuset.cpus") in ("0", "1")
    update(agent, container_id, Limits(cpuset_cpus="0"))
    assert kernel(agent, container_id, v1="cpuset.cpus", v2="cpuset.cpus") == "0"
    assert kernel(agent, container_id, v1="cpuset.mems", v2="cpuset.mems") == "0"


def test_swap_counts_with_memory(agent: AgentProcess, handler: str) -> None:
    both = Limits(memory_limit_in_bytes=64 << 20, memory_swap_limit_in_bytes=96 << 20)
    container_id = made(agent, handler, both)
    swap = kernel(agent, container_id, v1="memory.memsw.limit_in_bytes", v2="memory.swap.max")
    assert int(swap) == (96 << 20 if TREE.version == 1 else 32 << 20)
    alone = made(agent, handler, Limits(memory_limit_in_bytes=64 << 20))
    swap = kernel(agent, alone, v1="memory.memsw.limit_in_bytes", v2="memory.swap.max")
    assert int(swap) == (64 << 20 if TREE.version == 1 else 0), "a container with a limit of memory got swap besides"
    update(agent, alone, Limits(memory_limit_in_bytes=80 << 20))
    swap = kernel(agent, alone, v1="memory.memsw.limit_in_bytes", v2="memory.swap.max")
    assert int(swap) == (80 << 20 if TREE.version == 1 else 0)


def test_huge_pages(agent: AgentProcess, handler: str) -> None:
    if TREE.version == 1 and not Path("/sys/fs/cgroup/hugetlb/cgroup.procs").exists():
        pytest.skip("huge pages cannot be limited here")
    limits = Limits()
    limits.hugepage_limits.add(page_size="2MB", limit=4 << 20)
    container_id = made(agent, handler, limits)
    file = {"v1": "hugetlb.2MB.limit_in_bytes", "v2": "hugetlb.2MB.max"}
    assert kernel(agent, container_id, **file) == str(4 << 20)
    limits.hugepage_limits[0].limit = 2 << 20
    update(agent, container_id, limits)
    assert kernel(agent, container_id, **file) == str(2 << 20)
    assert agent.client.status(container_id).resources.linux.hugepage_limits[0].limit == 2 << 20


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(hugepage_limits=[cri_pb2.HugepageLimit(page_size="3MB", limit=3 << 20)]), "pages of 3MB"),
        (Limits(cpuset_cpus="zero"), "cpuset_cpus 'zero'"),
        (Limits(memory_limit_in_bytes=-5), "memory_limit_in_bytes -5"),
        (Limits(memory_limit_in_bytes=64 << 20, memory_swap_limit_in_bytes=1 << 20), "no larger than it"),
        (Limits(oom_score_adj=2000), "oom_score_adj 2000"),
        (Limits(unified={"../memory.high": "1"}), "unified"),
    ],
)
def test_invalid_limits_are_refused(agent: AgentProcess, limits: Limits, words: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        made(agent, "", limits)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert words in (refused.value.details() or "")


def test_unified_keys(agent: AgentProcess, handler: str) -> None:
    limits = Limits(unified={"memory.high": str(48 << 20)})
    if TREE.version == 2:
        assert kernel(agent, made(agent, handler, limits), v2="memory.high") == str(48 << 20)
        return
    with pytest.raises(grpc.RpcError) as refused:
        made(agent, handler, limits)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "needs cgroup v2" in (refused.value.details() or "")
    container_id = made(agent, handler, Limits(cpu_shares=300))
    limits.cpu_shares = 700
    with pytest.raises(grpc.RpcError):
        update(agent, container_id, limits)
    assert shares_of(agent, container_id) == "300"


def test_oom_score_is_never_that_of_the_agent(agent: AgentProcess, handler: str) -> None:
    for wanted in (-999, 0, 700):
        container_id = made(agent, handler, Limits(oom_score_adj=wanted))
        found = int(Path(f"/proc/{init_pid(agent, container_id)}/oom_score_adj").read_text())
        assert found == (max(wanted, _lowest()) if wanted < 0 else wanted)


def _lowest() -> int:
    bits = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff"))
    return -1000 if int(bits.split()[1], 16) >> 24 & 1 else int(Path("/proc/self/oom_score_adj").read_text())


@pytest.mark.parametrize("start", [False, True], ids=["created", "running"])
@pytest.mark.parametrize(
    "change",
    [
        {"cpuset_cpus": "4000"},  # the kernel refuses it, after shares and memory were written
        {"cpu_quota": 500},  # less than a millisecond
        {"hugepage_limits": [cri_pb2.HugepageLimit(page_size="3MB", limit=3 << 20)]},
    ],
    ids=["cpuset", "quota", "hugepages"],
)
def test_update_is_all_or_nothing(agent: AgentProcess, handler: str, start: bool, change: dict[str, Any]) -> None:
    before = Limits(cpu_shares=300, cpu_period=100000, cpu_quota=50000, memory_limit_in_bytes=64 << 20)
    container_id = made(agent, handler, before, start=start)
    files = (
        {"v1": "cpu.shares", "v2": "cpu.weight"},
        {"v1": "cpu.cfs_quota_us", "v2": "cpu.max"},
        {"v1": "memory.limit_in_bytes", "v2": "memory.max"},
        {"v1": "cpuset.cpus", "v2": "cpuset.cpus.effective"},
    )
    seen = [kernel(agent, container_id, **file) for file in files]
    with pytest.raises(grpc.RpcError):
        update(agent, container_id, Limits(cpu_shares=900, memory_limit_in_bytes=128 << 20, **change))
    assert [kernel(agent, container_id, **file) for file in files] == seen
    assert agent.client.status(container_id).resources.linux == before
    update(agent, container_id, Limits(cpu_shares=900, memory_limit_in_bytes=128 << 20))
    assert kernel(agent, container_id, **files[2]) == str(128 << 20)


def test_huge_pages_are_put_back_when_what_follows_is_refused(agent: AgentProcess, handler: str) -> None:
    if TREE.version == 1 and not Path("/sys/fs/cgroup/hugetlb/cgroup.procs").exists():
        pytest.skip("huge pages cannot be limited here")
    container_id = made(agent, handler, Limits())
    file = {"v1": "hugetlb.2MB.limit_in_bytes", "v2": "hugetlb.2MB.max"}
    unlimited = ("max", str(2**63 - 4096), str(2**63 - (2 << 20)))  # by version, and by whether it was ever written
    assert kernel(agent, container_id, **file) in unlimited
    pages = [cri_pb2.HugepageLimit(page_size="2MB", limit=4 << 20)]
    with pytest.raises(grpc.RpcError):
        update(agent, container_id, Limits(hugepage_limits=pages, cpuset_cpus="4000"))
    assert kernel(agent, container_id, **file) in unlimited


def test_page_sizes_without_a_limit_may_be_any(agent: AgentProcess, handler: str) -> None:
    pages = [cri_pb2.HugepageLimit(page_size=size) for size in ("3MB", "a\0b", "../../x", "x" * 300)]
    container_id = made(agent, handler, Limits(hugepage_limits=pages[:1]))
    update(agent, container_id, Limits(hugepage_limits=pages, cpu_shares=300))
    assert agent.client.status(container_id).resources.linux.cpu_shares == 300


@pytest.mark.parametrize("start", [False, True], ids=["created", "running"])
def test_oom_score_is_changed_with_the_limits_or_not_at_all(agent: AgentProcess, handler: str, start: bool) -> None:
    container_id = made(agent, handler, Limits(oom_score_adj=500), start=start)
    score = Path(f"/proc/{init_pid(agent, container_id)}/oom_score_adj")
    update(agent, container_id, Limits(oom_score_adj=300, cpu_shares=700))
    assert (int(score.read_text()), agent.client.status(container_id).resources.linux.oom_score_adj) == (300, 300)
    update(agent, container_id, Limits(cpu_shares=800))
    assert int(score.read_text()) == 300
    for wrong in (Limits(oom_score_adj=900, cpuset_cpus="4000"), Limits(oom_score_adj=1001, cpu_shares=900)):
        with pytest.raises(grpc.RpcError):
            update(agent, container_id, wrong)
        assert int(score.read_text()) == 300
    assert agent.client.status(container_id).resources.linux == Limits(oom_score_adj=300, cpu_shares=800)


def test_processes_are_limited_by_the_node(agent: AgentProcess, handler: str) -> None:
    """No limit is configured here, and none may be inherited or made up."""
    attacker = Attacker.start(agent, handler, container_config("main", "sleep", "1000"))
    assert kernel(agent, attacker.container_id, v1="pids.max", v2="pids.max") == "max"


@pytest.mark.parametrize("given", [False, True])
def test_containers_are_in_the_pod_s_cgroup_under_their_own_id(agent: AgentProcess, handler: str, given: bool) -> None:
    """By the path that the kernel reports. A parent that the client gave outlives the pod, the agent's own does not."""
    tree = CgroupTree.of_host(agent.cgroup_driver)
    sandbox = sandbox_config(agent)
    if given:
        sandbox.linux.cgroup_parent = agent.parent_for_pods("pod1")
    sandbox_id = agent.client.run_sandbox(sandbox, handler)
    container_id = agent.client.create(sandbox_id, container_config("main", "sleep", "1000"), sandbox)
    agent.client.start(container_id)
    parent = sandbox.linux.cgroup_parent or tree.default_parent(agent.cgroup_parent, sandbox_id)
    expected = tree.path(parent, container_id, uses_subgroup=handler == "crun")
    lines = Path(f"/proc/{init_pid(agent, container_id)}/cgroup").read_text().splitlines()
    held = {line.split(":", 2)[1]: line.split(":", 2)[2] for line in lines}
    assert held["" if tree.version == 2 else "memory"] == expected
    assert container_id in expected
    agent.client.stop_sandbox(sandbox_id)
    agent.client.remove_sandbox(sandbox_id)
    assert not tree.exists(expected)
    assert tree.exists(tree.parent_path(parent)) == given
    if tree.driver == "cgroupfs":
        tree.remove(tree.parent_path(parent))


def test_sysctls_that_a_pod_has_without_asking(agent: AgentProcess, handler: str) -> None:
    """Users may ping and listen on any port of their pod; the node's own values stay."""
    names = ("ping_group_range", "ip_unprivileged_port_start")
    before = [Path(f"/proc/sys/net/ipv4/{name}").read_text().split() for name in names]
    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox, handler)
    config = container_config("main", "sleep", "1000")
    config.linux.security_context.run_as_user.value = 1000
    config.linux.security_context.capabilities.drop_capabilities.append("ALL")
    container_id = agent.client.create(sandbox_id, config, sandbox)
    agent.client.start(container_id)
    look = "; ".join(f"cat /proc/sys/net/ipv4/{name}" for name in names)
    assert agent.client.output(container_id, "sh", "-c", look).split() == ["0", "2147483647", "0"]
    listen = "nc -l -p 80 & until netstat -lnt | grep -q ':80 '; do kill -0 $! || exit 1; done; kill $!"
    assert agent.client.exec(container_id, "sh", "-c", listen).exit_code == 0
    assert [Path(f"/proc/sys/net/ipv4/{name}").read_text().split() for name in names] == before
