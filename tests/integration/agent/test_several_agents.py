"""Two agents of one node, as the README shows them: each with its own folders and bridge, both with every default."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from host.files import mounts
from proto.runtime.v1 import cri_pb2
from runtime.cgroups.monitor_cgroup import MonitorCgroup
from runtime.cgroups.tree import CgroupTree
from tests.support.agent import AgentProcess
from tests.support.pods import container_config, run_container, sandbox_config

if os.geteuid() != 0:
    pytest.skip("needs root", allow_module_level=True)

_DEFAULT_PARENT = "/podkeel"


class DefaultAgent(AgentProcess):
    """An agent that says nothing of where its pods' cgroups go."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        super().__init__(folder)
        configuration = folder / "config.toml"
        lines = [line for line in configuration.read_text().split("\n") if not line.startswith("cgroup_parent")]
        configuration.write_text("\n".join(lines))
        self.cgroup_parent = _DEFAULT_PARENT


@pytest.fixture
def two(tmp_path: Path, busybox: Path) -> Iterator[tuple[DefaultAgent, DefaultAgent]]:
    one, other = DefaultAgent(tmp_path / "one"), DefaultAgent(tmp_path / "two")
    try:
        for agent in (one, other):
            agent.start()
            agent.import_busybox(busybox)
        yield one, other
    finally:
        one.reset()
        other.reset()


def _run(agent: AgentProcess) -> tuple[str, str, str]:
    """A pod with a container that runs, and one that has only a cgroup."""
    config = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(config)
    container_id = agent.client.create(sandbox_id, container_config("main", "sleep", "1000"), config)
    agent.client.start(container_id)
    empty = agent.client.run_sandbox(sandbox_config(agent))
    for folder in _cgroups(empty):
        folder.mkdir(parents=True)
    return sandbox_id, container_id, empty


def _cgroups(sandbox_id: str) -> list[Path]:
    table = [entry for entry in mounts.mount_table() if entry.filesystem == "cgroup"]
    roots = [Path(entry.target) for entry in table if "pids" in entry.super_options.split(",")]
    roots = roots or [Path(entry.target) for entry in mounts.mount_table() if entry.filesystem == "cgroup2"]
    return [root / _DEFAULT_PARENT.strip("/") / sandbox_id for root in roots[:1]]


def _lives(agent: AgentProcess, pod: tuple[str, str, str]) -> bool:
    _, container_id, empty = pod
    assert agent.client.findings() == []
    assert agent.client.status(container_id).state == cri_pb2.CONTAINER_RUNNING
    assert agent.client.exec(container_id, "ip", "-4", "addr", "show", "eth0").exit_code == 0
    return all(folder.is_dir() for folder in _cgroups(empty))


def test_two_agents_with_the_default_cgroup_parent_leave_each_other_alone(
    two: tuple[DefaultAgent, DefaultAgent],
) -> None:
    if two[0].cgroup_driver == "systemd":
        pytest.skip("makes cgroups by hand, which systemd keeps to itself")
    pods = [_run(agent) for agent in two]
    for _ in range(2):
        assert all(_lives(agent, pod) for agent, pod in zip(two, pods, strict=True))
        for agent in two:
            agent.restart()
    two[0].reset()
    assert _lives(two[1], pods[1])
    assert not any(folder.exists() for folder in _cgroups(pods[0][0]))


def test_a_cgroup_left_by_a_pod_that_is_gone_is_its_agents_to_remove(two: tuple[DefaultAgent, DefaultAgent]) -> None:
    if two[0].cgroup_driver == "systemd":
        pytest.skip("makes cgroups by hand, which systemd keeps to itself")
    one, other = two
    own_id = (one.data / "agent-id").read_text().strip()
    assert own_id == (one.run / "agent-id").read_text().strip()
    left = _cgroups("e" * 52 + own_id)
    for folder in left:
        folder.mkdir(parents=True)
    assert [finding.split()[0] for finding in one.client.findings()] == ["cgroup"]
    assert other.client.findings() == []
    other.restart()
    assert all(folder.exists() for folder in left)
    one.restart()
    assert one.client.findings() == []
    assert not any(folder.exists() for folder in left)


def test_pods_of_a_version_without_agent_ids_keep_running(own_agent: AgentProcess) -> None:
    config = sandbox_config(own_agent)
    sandbox_id = own_agent.client.run_sandbox(config)
    container_id = own_agent.client.create(sandbox_id, container_config("main", "sleep", "1000"), config)
    own_agent.client.start(container_id)
    own_agent.kill()
    monitors = _monitors_of(own_agent)
    for folder in (own_agent.data, own_agent.run):
        (folder / "agent-id").unlink()
    own_agent.start()
    asyncio.run(monitors.remove())  # the agent has moved conmon to the cgroup of its new id
    assert not sandbox_id.endswith((own_agent.data / "agent-id").read_text().strip())
    assert own_agent.client.findings() == []
    assert own_agent.client.exec(container_id, "true").exit_code == 0
    own_agent.client.stop_sandbox(sandbox_id)
    own_agent.client.remove_sandbox(sandbox_id)
    assert own_agent.client.findings() == []
    parent = own_agent.cgroup_parent.strip("/")
    assert not list(Path("/sys/fs/cgroup").glob(f"*/{parent}/{sandbox_id}"))


def _monitors_of(agent: AgentProcess) -> MonitorCgroup:
    """The cgroup of the agent's monitors, which only an agent with the same id removes."""
    return MonitorCgroup(CgroupTree.of_host("auto"), "", (agent.data / "agent-id").read_text().strip())


def _refusal(agent: AgentProcess, *more: str) -> str:
    """What a start says that must not succeed."""
    command = agent.command("serve", *agent.flags, *more)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def _network_of(sandbox: AgentProcess, pod: str) -> set[str]:
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    rules = subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=True).stdout
    address = sandbox.client.sandbox_status(pod).network.ip
    assert address in rules
    return {line.split(": ")[1] for line in links.splitlines()}


def test_a_second_agent_never_takes_what_is_the_first_ones(own_agent: AgentProcess, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    second = AgentProcess(tmp_path / "second")
    bridge, subnet, address = second.bridge, second.subnet, second.address
    sandbox_id, container_id = run_container(own_agent, "sleep", "1000")
    before = _network_of(own_agent, sandbox_id)
    try:
        for _ in range(2):  # while the first agent runs, and while it does not
            second.bridge = own_agent.bridge
            said = _refusal(second)
            for part in (f"bridge {own_agent.bridge}", str(own_agent.data), "network.bridge", "podkeel reset"):
                assert part in said, said
            second.bridge, second.subnet = bridge, own_agent.subnet
            said = _refusal(second)
            for part in (own_agent.subnet, own_agent.bridge, str(own_agent.data), "network.pod_cidrs", "podkeel reset"):
                assert part in said, said
            second.subnet = subnet
            if own_agent.process is not None:
                second.address = own_agent.address
                said = _refusal(second)
                assert "is served by" in said
                assert "another socket" in said
                second.address = address
                own_agent.kill()
        own_agent.start()
        assert _network_of(own_agent, sandbox_id) >= before
        assert own_agent.client.exec(container_id, "ping", "-c", "1", _gateway(own_agent)).exit_code == 0
        assert own_agent.client.findings() == []
        second.start()
        second.stop()
    finally:
        second.reset()


def _gateway(agent: AgentProcess) -> str:
    return agent.subnet.removesuffix("0/20") + "1"


def test_a_bridge_whose_agent_is_gone_changes_hands(tmp_path: Path) -> None:
    for name in ("gone", "new"):
        (tmp_path / name).mkdir()
    gone, new = AgentProcess(tmp_path / "gone"), AgentProcess(tmp_path / "new")
    gone.start()
    gone.kill()
    monitors = _monitors_of(gone)
    shutil.rmtree(gone.data)
    for target in mounts.mounts_below(gone.run):
        mounts.unmount(target)
    shutil.rmtree(gone.run)
    new.bridge, new.subnet = gone.bridge, gone.subnet
    try:
        new.start()
        assert new.client.findings() == []
    finally:
        new.reset()
        CgroupTree.of_host("auto").remove(gone.cgroup_parent)
        asyncio.run(monitors.remove())


@pytest.mark.parametrize("table", ["streaming", "metrics"])
def test_an_address_that_another_agent_listens_on_is_reported(
    own_agent: AgentProcess, tmp_path: Path, table: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (tmp_path / "second").mkdir()
        second = AgentProcess(tmp_path / "second", options=f'[{table}]\naddress = "127.0.0.1:{port}"')
        try:
            said = _refusal(second)
        finally:
            second.reset()
    assert f"127.0.0.1:{port}" in said
    assert f"{table}.address" in said
    assert own_agent.client.findings() == []
