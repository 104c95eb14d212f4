"""crun as the agent executes it: from sealed memory, following the file when that is replaced."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.agent.test_hanging_volume import Silent, threads
from tests.support.agent import SOON, AgentProcess, running_agent, wait_for
from tests.support.pods import container_config, remove_all_pods, sandbox_config


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A crun of the test's own."""
    real = shutil.which("crun")
    if real is None:
        pytest.skip("crun is not installed")
    folder = tmp_path / "programs"
    folder.mkdir()
    return Path(shutil.copy(real, folder / "own-crun"))


@pytest.fixture
def agent(tmp_path: Path, busybox: Path, program: Path) -> Iterator[AgentProcess]:
    (tmp_path / "agent").mkdir()
    options = f'[runtime.handlers.crun]\npath = "{program}"\n'
    with running_agent(tmp_path / "agent", busybox, options=options, runtime="crun") as process:
        yield process
        remove_all_pods(process.client)
        assert process.client.findings() == []


def test_a_container_is_made_by_the_sealed_copy(agent: AgentProcess) -> None:
    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox)
    container_id = agent.client.create(sandbox_id, container_config("main", "sleep", "1000"), sandbox)
    request = cri_pb2.ContainerStatusRequest(container_id=container_id, verbose=True)
    init = json.loads(agent.client.call("ContainerStatus", request).info["info"])["pid"]
    assert str(Path(f"/proc/{init}/exe").readlink()).startswith("/memfd:own-crun")
    agent.client.start(container_id)


def test_a_replaced_program_is_the_one_used_next(agent: AgentProcess, program: Path, tmp_path: Path) -> None:
    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox)
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho this one is broken >&2\nexit 1\n")
    broken.chmod(0o755)
    kept = program.rename(tmp_path / "kept")
    broken.rename(program)
    with pytest.raises(grpc.RpcError, match="this one is broken"):
        agent.client.create(sandbox_id, container_config("main", "sleep", "1000"), sandbox)
    kept.rename(program)
    agent.client.start(agent.client.create(sandbox_id, container_config("main", "sleep", "1000"), sandbox))


def test_one_call_waits_for_a_file_system_that_does_not_answer_and_others_use_the_copy(
    agent: AgentProcess, program: Path
) -> None:
    if not Path("/dev/fuse").exists():
        pytest.skip("this kernel has no FUSE")
    client, sandbox = agent.client, sandbox_config(agent)
    sandbox_id = client.run_sandbox(sandbox)
    silent = Silent(program.parent)
    try:
        config = container_config("first", "sleep", "1000")
        request = cri_pb2.CreateContainerRequest(pod_sandbox_id=sandbox_id, config=config, sandbox_config=sandbox)
        first = client.future("CreateContainer", request)
        wait_for(lambda: threads(agent), what="a thread that hangs")
        client.call("Version", cri_pb2.VersionRequest())
        container_id = client.create(sandbox_id, container_config("second", "sleep", "1000"), sandbox)
        client.start(container_id)
        assert client.output(container_id, "echo", "here") == "here\n"
        client.remove(container_id)
        assert not first.done()
    finally:
        silent.end()
    client.start(first.result(SOON).container_id)


def test_a_restarted_agent_makes_a_new_copy(agent: AgentProcess) -> None:
    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox)
    container_id = agent.client.create(sandbox_id, container_config("main", "sleep", "1000"), sandbox)
    agent.kill()
    agent.start()
    agent.client.start(container_id)
    assert agent.client.exec(container_id, "echo", "here").stdout == b"here\n"


def test_a_start_without_the_program_ends_the_container(agent: AgentProcess, program: Path, tmp_path: Path) -> None:
    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox)
    container_id = agent.client.create(sandbox_id, container_config("main", "sleep", "1000"), sandbox)
    kept = program.rename(tmp_path / "kept")
    with pytest.raises(grpc.RpcError, match="own-crun' is not installed"):
        agent.client.start(container_id)
    status = agent.client.status(container_id)
    assert (status.state, status.exit_code, status.reason) == (cri_pb2.CONTAINER_EXITED, 128, "StartError")
    kept.rename(program)
    agent.client.remove(container_id)


def test_a_missing_program_does_not_mean_that_the_pod_is_missing(
    agent: AgentProcess, program: Path, tmp_path: Path
) -> None:
    """For clients, NOT_FOUND means that the removal succeeded."""
    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox)
    container_id = agent.client.create(sandbox_id, container_config("main", "sleep", "1000"), sandbox)
    agent.client.start(container_id)
    kept = program.rename(tmp_path / "kept")
    for method, request in (
        ("RemoveContainer", cri_pb2.RemoveContainerRequest(container_id=container_id)),
        ("RemovePodSandbox", cri_pb2.RemovePodSandboxRequest(pod_sandbox_id=sandbox_id)),
    ):
        with pytest.raises(grpc.RpcError, match="own-crun' is not installed") as failed:
            agent.client.call(method, request)
        assert failed.value.code() == grpc.StatusCode.UNAVAILABLE
    kept.rename(program)
    agent.client.remove_sandbox(sandbox_id)
