"""Containers whose processes do not run: frozen by an operator or by their own program, or left by their conmon."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from runtime.cgroups.freezer import freeze
from tests.integration.agent.hardening import init_pid
from tests.integration.conformance.support import refused
from tests.support.agent import PATIENCE, AgentProcess, wait_for
from tests.support.pods import container_config, log_lines, sandbox_config, shared_pids

PROMPTLY = 6 * PATIENCE


def start(agent: AgentProcess, handler: str, *, shared: bool = False) -> tuple[str, str]:
    """A pod with a container that heeds no signal; their ids."""
    sandbox = sandbox_config(agent)
    config = container_config("main", "sh", "-c", "trap '' TERM; while :; do sleep 0.1; done")
    if shared:
        shared_pids(sandbox)
        shared_pids(config)
    sandbox_id = agent.client.run_sandbox(sandbox, handler)
    container_id = agent.client.create(sandbox_id, config, sandbox)
    agent.client.start(container_id)
    return sandbox_id, container_id


def freezer_of(agent: AgentProcess, container_id: str) -> Path:
    """The cgroup by which the container can be frozen."""
    return freezer_of_process(init_pid(agent, container_id))


def freezer_of_process(pid: int) -> Path:
    """The cgroup by which a process can be frozen."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "freezer":
            return Path("/sys/fs/cgroup/freezer") / path.lstrip("/")
        if controllers == "" and not Path("/sys/fs/cgroup/freezer").exists():
            return Path("/sys/fs/cgroup") / path.lstrip("/")
    raise AssertionError("no freezer")


@contextlib.contextmanager
def frozen(group: Path) -> Iterator[None]:
    """Freeze a cgroup; thawed afterwards if it is still there."""
    legacy = (group / "freezer.state").exists()
    file = group / ("freezer.state" if legacy else "cgroup.freeze")
    assert freeze(group, 10 * PATIENCE)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.write_text("THAWED" if legacy else "0")


def promptly(work: Callable[[], object]) -> None:
    began = time.monotonic()
    work()
    assert time.monotonic() - began < PROMPTLY


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("call", ["stop", "remove", "stop_sandbox", "remove_sandbox"])
def test_frozen_container_is_killed_and_then_thawed(agent: AgentProcess, handler: str, call: str, shared: bool) -> None:
    client = agent.client
    sandbox_id, container_id = start(agent, handler, shared=shared)
    with frozen(freezer_of(agent, container_id)):
        if call == "stop":
            promptly(lambda: client.stop(container_id, 30))
            status = client.status(container_id)
            assert (status.state, status.exit_code) == (cri_pb2.CONTAINER_EXITED, 137)
        elif call == "remove":
            promptly(lambda: client.remove(container_id))
        elif call == "stop_sandbox":
            promptly(lambda: client.stop_sandbox(sandbox_id))
        else:
            promptly(lambda: client.remove_sandbox(sandbox_id))
    client.remove_sandbox(sandbox_id)
    assert client.findings() == []


def test_frozen_pod_can_be_stopped_as_a_whole_and_its_containers_say_why_not(agent: AgentProcess, handler: str) -> None:
    client = agent.client
    sandbox_id, container_id = start(agent, handler)
    group = freezer_of(agent, container_id).parent
    legacy = (group / "freezer.state").exists()
    with frozen(group):
        if legacy:  # version 2 ends what is frozen
            with refused(grpc.StatusCode.FAILED_PRECONDITION, f"cgroup {group} is frozen"):
                client.stop(container_id, 0)
        promptly(lambda: client.stop_sandbox(sandbox_id))
        assert client.status(container_id).exit_code == 137
    client.remove_sandbox(sandbox_id)
    assert client.findings() == []


def test_exec_in_a_frozen_container_says_so(agent: AgentProcess, handler: str) -> None:
    _, container_id = start(agent, handler)
    with frozen(freezer_of(agent, container_id)):
        began = time.monotonic()
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "is frozen"):
            agent.client.exec(container_id, "true")
        command = agent.command("exec", "--socket", agent.address, container_id, "true")
        streamed = subprocess.run(command, capture_output=True, text=True, timeout=20 * PATIENCE, check=False)
        assert streamed.returncode != 0
        assert "is frozen" in streamed.stderr
        assert time.monotonic() - began < PROMPTLY
    assert agent.client.exec(container_id, "true").exit_code == 0


def test_command_that_is_frozen_in_its_middle_ends_at_its_time_limit(agent: AgentProcess, handler: str) -> None:
    _, container_id = start(agent, handler)
    group = freezer_of(agent, container_id)
    request = cri_pb2.ExecSyncRequest(container_id=container_id, cmd=["sleep", "1000"], timeout=2)
    running = agent.client.future("ExecSync", request)
    wait_for(lambda: any("1000" in words for words in commands(group)), what="the command")
    with frozen(group):
        with pytest.raises(grpc.RpcError) as ended:
            running.result(timeout=20 * PATIENCE)
        assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def commands(group: Path) -> list[str]:
    found = []
    for pid in (group / "cgroup.procs").read_text().split():
        with contextlib.suppress(OSError):
            found.append(Path(f"/proc/{pid}/cmdline").read_text())
    return found


def monitor_pid(agent: AgentProcess, container_id: str) -> int:
    request = cri_pb2.ContainerStatusRequest(container_id=container_id, verbose=True)
    pid = int(json.loads(agent.client.call("ContainerStatus", request).info["info"])["pid"])
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("dead", [False, True])
def test_stopped_conmon_does_not_keep_its_container(agent: AgentProcess, handler: str, dead: bool) -> None:
    client = agent.client
    sandbox_id, container_id = start(agent, handler)
    init, monitor = init_pid(agent, container_id), monitor_pid(agent, container_id)
    assert Path(f"/proc/{monitor}/comm").read_text() == "conmon\n"
    os.kill(monitor, signal.SIGSTOP)
    if dead:
        os.kill(init, signal.SIGKILL)
        wait_for(lambda: ") Z " in Path(f"/proc/{init}/stat").read_text(), what="the program's end")
    promptly(lambda: client.stop(container_id, 1))
    status = client.status(container_id)
    assert (status.state, status.exit_code) == (cri_pb2.CONTAINER_EXITED, 137)
    client.remove_sandbox(sandbox_id)
    assert client.findings() == []


def test_a_log_that_a_stopped_conmon_must_reopen_continues_with_it(agent: AgentProcess) -> None:
    client = agent.client
    sandbox = sandbox_config(agent)
    sandbox_id = client.run_sandbox(sandbox)
    config = container_config("main", "sh", "-c", "i=0; while :; do echo $((i=i+1)); sleep 0.01; done")
    container_id = client.create(sandbox_id, config, sandbox)
    client.start(container_id)
    path = Path(client.status(container_id).log_path)
    wait_for(lambda: path.stat().st_size > 0, what="a line")
    monitor = monitor_pid(agent, container_id)
    os.kill(monitor, signal.SIGSTOP)
    rotated = path.rename(path.with_suffix(".1"))
    request = cri_pb2.ReopenContainerLogRequest(container_id=container_id)
    for _ in range(2):  # it is logged once, with any requests meanwhile
        with refused(grpc.StatusCode.INTERNAL, "did not open"):
            client.call("ReopenContainerLog", request)
    os.kill(monitor, signal.SIGCONT)
    wait_for(lambda: path.stat().st_size > 100, what="lines in the new log")
    client.call("ReopenContainerLog", request)
    again = path.rename(path.with_suffix(".2"))
    client.call("ReopenContainerLog", request)
    wait_for(lambda: path.stat().st_size > 100, what="lines in the newest log")
    assert monitor_pid(agent, container_id) == monitor
    client.stop(container_id)
    numbers = [int(line) for log in (rotated, again, path) for line in log_lines(log)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert client.status(container_id).exit_code == 137
    client.remove_sandbox(sandbox_id)
