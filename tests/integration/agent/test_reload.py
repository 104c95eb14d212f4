"""A configuration that changes while the agent serves."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from proto.podkeel.v1 import agent_pb2
from proto.runtime.v1 import cri_pb2
from tests.support.agent import BUSYBOX, AgentProcess, running_agent, wait_for
from tests.support.pods import container_config, run_container, sandbox_config

IMAGE = cri_pb2.ImageStatusRequest(image=cri_pb2.ImageSpec(image=BUSYBOX))


@pytest.fixture
def agent(tmp_path: Path, busybox: Path) -> Iterator[AgentProcess]:
    with running_agent(tmp_path, busybox) as running:
        yield running


def add(agent: AgentProcess, name: str, text: str) -> Path:
    folder = agent.folder / "conf.d"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def reload(agent: AgentProcess) -> Any:
    return agent.client.call("Reload", agent_pb2.ReloadRequest())


def pinned(agent: AgentProcess) -> bool:
    return bool(agent.client.call("ImageStatus", IMAGE).image.pinned)


def handlers(agent: AgentProcess) -> set[str]:
    return {item.name for item in agent.client.call("Status", cri_pb2.StatusRequest()).runtime_handlers}


def test_changed_options_take_effect_or_are_listed(agent: AgentProcess) -> None:
    assert not pinned(agent)
    add(agent, "10", '[images]\npinned = ["*busybox*"]\n[log]\nlevel = "debug"\n[runtime]\nselinux = false\n')
    command = agent.command("reload", "--socket", agent.address)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.splitlines())
    assert lines == ["changed: images.pinned", "changed: log.level", "needs a restart: runtime.selinux"]
    assert pinned(agent)
    with pytest.raises(grpc.RpcError):
        agent.client.status("absent")
    wait_for(lambda: " debug " in agent.log.read_text(), what="the refusal, a line of level debug")
    again = reload(agent)
    assert (list(again.applied), list(again.need_restart)) == ([], ["runtime.selinux"])


def test_limits_of_new_containers_follow(agent: AgentProcess) -> None:
    add(agent, "10", "[runtime]\npids_limit = 77\nshm_size = 1048576\n")
    assert sorted(reload(agent).applied) == ["runtime.pids_limit", "runtime.shm_size"]
    _, container_id = run_container(agent, "sleep", "1000")
    shown = agent.client.output(container_id, "sh", "-c", "df -k /dev/shm | tail -n 1")
    assert shown.split()[1] == "1024"
    request = cri_pb2.ContainerStatusRequest(container_id=container_id, verbose=True)
    spec = json.loads(agent.client.call("ContainerStatus", request).info["info"])["runtimeSpec"]
    assert spec["linux"]["resources"]["pids"]["limit"] == 77


def test_a_wrong_file_changes_nothing(agent: AgentProcess) -> None:
    add(agent, "10", '[images]\npinned = ["*"]\n')
    wrong = add(agent, "20", '[log]\nlevel = "loud"\n')
    with pytest.raises(grpc.RpcError) as refused:
        reload(agent)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "20.toml:2: log.level" in str(refused.value.details())
    assert not pinned(agent)
    os.kill(agent.pid(), signal.SIGHUP)
    wait_for(lambda: "the old one stays in force" in agent.log.read_text(), what="the refusal in the log")
    wrong.unlink()


def test_a_signal_reloads_and_ends_nothing(agent: AgentProcess) -> None:
    add(agent, "10", '[images]\npinned = ["*"]\n')
    os.kill(agent.pid(), signal.SIGHUP)
    wait_for(lambda: "changed: images.pinned" in agent.log.read_text(), what="the reload")
    assert pinned(agent)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def served(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
            return b"podkeel_build_info" in answer.read()
    except OSError:
        return False


def test_metrics_move_and_stay_where_they_are_if_the_new_place_is_taken(agent: AgentProcess) -> None:
    first, second = free_port(), free_port()
    path = add(agent, "10", f'[metrics]\naddress = "127.0.0.1:{first}"\n')
    assert list(reload(agent).applied) == ["metrics.address"]
    assert served(first)
    path.write_text(f'[metrics]\naddress = "127.0.0.1:{second}"\n')
    reload(agent)
    assert (served(first), served(second)) == (False, True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        path.write_text(f'[metrics]\naddress = "127.0.0.1:{taken.getsockname()[1]}"\n')
        with pytest.raises(grpc.RpcError) as refused:
            reload(agent)
        assert "cannot be listened on" in str(refused.value.details())
    assert served(second)
    path.write_text('[metrics]\naddress = ""\n')
    reload(agent)
    assert not served(second)


def test_handlers_come_and_go_and_keep_their_containers(agent: AgentProcess) -> None:
    program = next(name for name in sorted(handlers(agent)) if name)
    path = add(agent, "10", f'[runtime.handlers.more]\npath = "{program}"\n')
    assert list(reload(agent).applied) == ["runtime.handlers"]
    assert "more" in handlers(agent)
    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox, "more")
    container_id = agent.client.create(sandbox_id, container_config("main", "sleep", "1000"), sandbox)
    agent.client.start(container_id)
    path.unlink()
    reload(agent)
    assert "more" not in handlers(agent)
    assert agent.client.output(container_id, "echo", "still served") == "still served\n"
    with pytest.raises(grpc.RpcError) as refused:
        agent.client.run_sandbox(sandbox_config(agent, "other"), "more")
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    agent.client.stop(container_id)
    agent.client.remove(container_id)
    agent.client.stop_sandbox(sandbox_id)
    agent.client.remove_sandbox(sandbox_id)


def test_a_default_that_does_not_work_changes_nothing(agent: AgentProcess) -> None:
    before = handlers(agent)
    add(agent, "10", '[runtime]\ndefault_runtime = "bad"\n[runtime.handlers.bad]\npath = "/bin/false"\n')
    with pytest.raises(grpc.RpcError) as refused:
        reload(agent)
    assert "'bad' does not work here" in str(refused.value.details())
    assert handlers(agent) == before
    run_container(agent, "true")
