"""How containers and commands in them start, fail and end."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.agent.refusals import refused
from tests.support.agent import PATIENCE, AgentProcess, wait_for
from tests.support.pods import (
    POLITE,
    container_config,
    log_lines,
    run_container,
    sandbox_config,
    shared_pids,
    wait_for_log,
)

EXITED = cri_pb2.CONTAINER_EXITED


@pytest.mark.parametrize("handler", ["crun", "runc"])
@pytest.mark.parametrize("command", ["/absent", "absent", "/etc/passwd", "/etc"])
def test_a_program_that_cannot_run_fails_the_start(agent: AgentProcess, handler: str, command: str) -> None:
    client = agent.client
    sandbox = sandbox_config(agent)
    sandbox_id = client.run_sandbox(sandbox, handler)
    container_id = client.create(sandbox_id, container_config("main", command, "argument"), sandbox)
    assert client.status(container_id).state == cri_pb2.CONTAINER_CREATED
    refused("INVALID_ARGUMENT", command, call=lambda: client.start(container_id))
    status = client.status(container_id)
    assert (status.state, status.exit_code) == (EXITED, 128)
    assert status.reason in ("StartError", "ContainerCannotRun")
    assert command in status.message
    client.remove(container_id)
    assert client.findings() == []


@pytest.mark.parametrize("handler", ["crun", "runc"])
def test_a_command_that_cannot_run_fails_the_exec(agent: AgentProcess, handler: str) -> None:
    client = agent.client
    sandbox = sandbox_config(agent)
    sandbox_id = client.run_sandbox(sandbox, handler)
    container_id = client.create(sandbox_id, container_config("main", "sleep", "1000"), sandbox)
    client.start(container_id)
    refused("INVALID_ARGUMENT", "/absent", call=lambda: client.exec(container_id, "/absent"))
    refused("INVALID_ARGUMENT", "no command", call=lambda: client.exec(container_id))
    assert client.output(container_id, "echo", "works") == "works\n"


def _processes(agent: AgentProcess, container_id: str) -> list[str]:
    request = cri_pb2.ContainerStatusRequest(container_id=container_id, verbose=True)
    cgroup = json.loads(agent.client.call("ContainerStatus", request).info["info"])["cgroup"].lstrip("/")
    roots = (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup"))
    text = next(root / cgroup / "cgroup.procs" for root in roots if (root / cgroup).is_dir()).read_text()
    alive = []
    for pid in text.split():
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                alive.append(pid)
    return alive


@pytest.mark.parametrize("handler", ["crun", "runc"])
def test_a_command_past_its_time_leaves_no_process(agent: AgentProcess, handler: str) -> None:
    client = agent.client
    sandbox = sandbox_config(agent)
    sandbox_id = client.run_sandbox(sandbox, handler)
    container_id = client.create(sandbox_id, container_config("main", "sleep", "1000"), sandbox)
    client.start(container_id)
    begin = time.monotonic()
    late = ("sh", "-c", "sleep 2000 & trap '' TERM; sleep 3000; true")
    refused("DEADLINE_EXCEEDED", "1 s", call=lambda: client.exec(container_id, *late, timeout=1))
    assert time.monotonic() - begin < 5 * PATIENCE  # a call that waits for the command would take 2000 s
    wait_for(lambda: len(_processes(agent, container_id)) == 1, what="only the first process")
    assert client.findings() == []


def test_a_command_whose_client_leaves_is_ended(agent: AgentProcess) -> None:
    _, container_id = run_container(agent, "sleep", "1000")
    request = cri_pb2.ExecSyncRequest(container_id=container_id, cmd=["sleep", "2000"])
    future = agent.client.future("ExecSync", request)
    wait_for(lambda: len(_processes(agent, container_id)) == 2, what="the command")
    future.cancel()
    wait_for(lambda: len(_processes(agent, container_id)) == 1, what="only the first process")


@pytest.mark.parametrize("stream", ["", " >&2"], ids=["stdout", "stderr"])
def test_too_much_output_is_cut(agent: AgentProcess, stream: str) -> None:
    _, container_id = run_container(agent, "sleep", "1000")
    response = agent.client.exec(container_id, "sh", "-c", f"yes | head -c 20000000{stream}")
    output = response.stderr if stream else response.stdout
    assert response.exit_code == 0
    assert 8 << 20 <= len(output) <= 16 << 20
    assert response.ByteSize() <= 16 << 20
    assert set(output) == set(b"y\n")


def test_without_log_path_there_is_no_log(agent: AgentProcess) -> None:
    client = agent.client
    sandbox = sandbox_config(agent)
    sandbox_id = client.run_sandbox(sandbox)
    container = container_config("main", "sh", "-c", "echo lost; sleep 1000")
    container.log_path = ""
    container_id = client.create(sandbox_id, container, sandbox)
    client.start(container_id)
    assert client.status(container_id).log_path == ""
    reopen = cri_pb2.ReopenContainerLogRequest(container_id=container_id)
    refused("FAILED_PRECONDITION", "no log", call=lambda: client.call("ReopenContainerLog", reopen))
    assert not list(Path(sandbox.log_directory).rglob("*.log"))


def test_a_renamed_log_is_followed_by_a_new_one(agent: AgentProcess) -> None:
    client = agent.client
    count = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.01; done"
    _, container_id = run_container(agent, "sh", "-c", count)
    path = Path(client.status(container_id).log_path)
    wait_for(lambda: path.read_text().count("\n") > 5)
    renamed = path.with_suffix(".1")
    path.rename(renamed)
    client.call("ReopenContainerLog", cri_pb2.ReopenContainerLogRequest(container_id=container_id))
    wait_for(lambda: path.exists() and path.read_text().count("\n") > 5)
    client.stop(container_id)
    lines = log_lines(renamed) + log_lines(path)
    assert lines == [str(number) for number in range(len(lines))]


def test_a_stop_that_was_given_up_does_not_count(agent: AgentProcess) -> None:
    client = agent.client
    trap = "trap 'echo asked; n=$((n+1)); [ $n = 2 ] && sleep 2 && exit 4' TERM; echo ready"
    _, container_id = run_container(agent, "sh", "-c", f"{trap}; while :; do sleep 0.05; done")
    wait_for_log(client, container_id)
    first = client.future("StopContainer", cri_pb2.StopContainerRequest(container_id=container_id, timeout=1))
    wait_for_log(client, container_id, "asked")
    first.cancel()
    client.stop(container_id, timeout=30)
    assert client.status(container_id).exit_code == 4


@pytest.mark.parametrize("eat", ["exec tail /dev/zero", "tail /dev/zero; exit $?"], ids=["first process", "child"])
def test_out_of_memory(agent: AgentProcess, eat: str) -> None:
    client = agent.client
    limits = cri_pb2.LinuxContainerConfig(resources=cri_pb2.LinuxContainerResources(memory_limit_in_bytes=32 << 20))
    _, container_id = run_container(agent, "sh", "-c", eat, linux=limits)
    wait_for(lambda: client.status(container_id).state == EXITED, 20)
    status = client.status(container_id)
    assert (status.exit_code, status.reason) == (137, "OOMKilled")


def test_containers_that_share_their_pids_see_each_other_and_end_together(agent: AgentProcess) -> None:
    client = agent.client
    sandbox = sandbox_config(agent)
    shared_pids(sandbox)
    sandbox_id = client.run_sandbox(sandbox)
    containers = []
    for name, command in (("first", "sleep 1111 & sleep 1112; true"), ("second", "sleep 2222")):
        container = container_config(name, "sh", "-c", command)
        shared_pids(container)
        containers.append(client.create(sandbox_id, container, sandbox))
        client.start(containers[-1])
    first, second = containers
    wait_for(lambda: all(f"sleep {n}" in client.output(second, "ps") for n in (1111, 1112, 2222)))
    client.stop(first)
    assert client.status(first).exit_code == 137
    wait_for(lambda: "sleep 111" not in client.output(second, "ps"), what="the end of its children")
    client.stop_sandbox(sandbox_id)
    assert client.status(second).exit_code == 137
    client.remove_sandbox(sandbox_id)
    assert client.findings() == []


def test_a_container_in_the_pids_of_another(agent: AgentProcess) -> None:
    client = agent.client
    sandbox = sandbox_config(agent)
    sandbox_id = client.run_sandbox(sandbox)
    target = client.create(sandbox_id, container_config("target", "sleep", "3333"), sandbox)
    client.start(target)
    debugger = container_config("debugger", *POLITE)
    options = cri_pb2.NamespaceOption(pid=cri_pb2.TARGET, target_id=target)
    debugger.linux.security_context.namespace_options.CopyFrom(options)
    debugger_id = client.create(sandbox_id, debugger, sandbox)
    client.start(debugger_id)
    assert "sleep 3333" in client.output(debugger_id, "ps")
    client.stop(debugger_id)
    assert client.status(target).state == cri_pb2.CONTAINER_RUNNING


def test_a_pod_in_the_namespaces_of_the_node(agent: AgentProcess) -> None:
    client = agent.client
    sandbox = sandbox_config(agent)
    options = cri_pb2.NamespaceOption(network=cri_pb2.NODE, ipc=cri_pb2.NODE, pid=cri_pb2.NODE)
    sandbox.linux.security_context.namespace_options.CopyFrom(options)
    sandbox_id = client.run_sandbox(sandbox)
    container = container_config("main", "sh", "-c", "sleep 4444 & sleep 5555; true")
    container.linux.security_context.namespace_options.CopyFrom(options)
    container_id = client.create(sandbox_id, container, sandbox)
    client.start(container_id)
    for kind in ("net", "ipc", "pid", "uts"):
        own = Path(f"/proc/self/ns/{kind}").readlink()
        assert client.output(container_id, "readlink", f"/proc/self/ns/{kind}").strip() == str(own)
    wait_for(lambda: len(_processes(agent, container_id)) == 3)
    client.stop(container_id)
    assert client.status(container_id).exit_code == 137
    client.remove_sandbox(sandbox_id)
    assert client.findings() == []
