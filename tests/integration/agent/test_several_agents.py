"""Two agents of one node, as the README shows them: each with its own folders and bridge, both with every default."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from host import mounts
from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess
from tests.support.pods import container_config, sandbox_config

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


def test_the_pods_of_a_version_that_gave_no_agent_ids_go_on(own_agent: AgentProcess) -> None:
    config = sandbox_config(own_agent)
    sandbox_id = own_agent.client.run_sandbox(config)
    container_id = own_agent.client.create(sandbox_id, container_config("main", "sleep", "1000"), config)
    own_agent.client.start(container_id)
    own_agent.kill()
    for folder in (own_agent.data, own_agent.run):
        (folder / "agent-id").unlink()
    own_agent.start()
    assert not sandbox_id.endswith((own_agent.data / "agent-id").read_text().strip())
    assert own_agent.client.findings() == []
    assert own_agent.client.exec(container_id, "true").exit_code == 0
    own_agent.client.stop_sandbox(sandbox_id)
    own_agent.client.remove_sandbox(sandbox_id)
    assert own_agent.client.findings() == []
    parent = own_agent.cgroup_parent.strip("/")
    assert not list(Path("/sys/fs/cgroup").glob(f"*/{parent}/{sandbox_id}"))
