"""One pod, all the way."""

from __future__ import annotations

from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess, wait_for
from tests.support.pods import POLITE, container_config, log_lines, run_container, sandbox_config, wait_for_log


def test_pod_runs_and_leaves_nothing(agent: AgentProcess) -> None:
    client = agent.client
    sandbox = sandbox_config(agent)
    sandbox_id = client.run_sandbox(sandbox)
    container_id = client.create(sandbox_id, container_config("main", "sh", "-c", "echo out; echo err >&2"), sandbox)
    assert client.status(container_id).state == cri_pb2.CONTAINER_CREATED
    client.start(container_id)
    wait_for(lambda: client.status(container_id).state == cri_pb2.CONTAINER_EXITED)
    status = client.status(container_id)
    assert (status.exit_code, status.reason, status.message) == (0, "Completed", "")
    assert sorted(log_lines(status.log_path)) == ["err", "out"]
    assert status.created_at < status.started_at <= status.finished_at
    client.remove(container_id)
    client.stop_sandbox(sandbox_id)
    assert client.sandbox_status(sandbox_id).state == cri_pb2.SANDBOX_NOTREADY
    client.remove_sandbox(sandbox_id)
    assert client.findings() == []


def test_exec_answers_output_and_exit_code(agent: AgentProcess) -> None:
    _, container_id = run_container(agent, "sleep", "1000")
    response = agent.client.exec(container_id, "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (response.stdout, response.stderr, response.exit_code) == (b"out\n", b"err\n", 7)


def test_stop_sends_the_stop_signal_then_kills(agent: AgentProcess) -> None:
    _, polite = run_container(agent, *POLITE)
    wait_for_log(agent.client, polite)
    agent.client.stop(polite, timeout=20)
    assert agent.client.status(polite).exit_code == 3
    _, deaf = run_container(agent, "sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.05; done")
    wait_for_log(agent.client, deaf)
    agent.client.stop(deaf, timeout=1)
    assert agent.client.status(deaf).exit_code == 137
    assert agent.client.status(deaf).reason == "Error"
