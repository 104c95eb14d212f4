"""ExecSync."""

from __future__ import annotations

import time

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.conformance.support import Pod, exited, refused
from tests.support.agent import SOON, AgentProcess
from tests.support.pods import container_config, sandbox_config

LIMIT = 16 << 20


def test_output_and_exit_code(pod: Pod) -> None:
    container_id = pod.sleeping()
    client = pod.agent.client
    answer = client.exec(container_id, "sh", "-c", "printf 'a\\000b'; printf 'err' >&2; exit 200")
    assert (answer.stdout, answer.stderr, answer.exit_code) == (b"a\0b", b"err", 200)
    assert client.exec(container_id, "sh", "-c", "kill -9 $$").exit_code == 137
    assert client.exec(container_id, "true") == cri_pb2.ExecSyncResponse()


@pytest.mark.parametrize("command", ["/no/such", "nosuchprogram", "/etc/passwd"])
def test_program_that_cannot_be_run(pod: Pod, command: str) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        pod.agent.client.exec(pod.sleeping(), command)
    assert command in (raised.value.details() or "")


def test_child_that_keeps_the_output_open_does_not_hang_the_call(pod: Pod) -> None:
    container_id = pod.sleeping()
    begin = time.monotonic()
    answer = pod.agent.client.exec(container_id, "sh", "-c", "sleep 1001 & echo done; exit 5", timeout=0)
    assert (answer.stdout, answer.exit_code) == (b"done\n", 5)
    assert time.monotonic() - begin < SOON  # a call that waits for the child would take 1001 s


def test_output_is_cut_so_that_the_answer_fits(pod: Pod) -> None:
    container_id = pod.sleeping()
    answer = pod.agent.client.exec(container_id, "sh", "-c", "head -c 20000000 /dev/zero; echo end >&2; exit 4")
    assert LIMIT - 8192 < len(answer.stdout) <= LIMIT
    assert (answer.stderr, answer.exit_code) == (b"end\n", 4)


def test_same_user_environment_and_folder_as_the_container(pod: Pod) -> None:
    config = container_config("main", "sleep", "1000", working_dir="/tmp")
    config.linux.security_context.run_as_user.value = 1000
    config.envs.add(key="GREETING", value=b"hello")
    container_id = pod.start(config)
    output = pod.agent.client.output(container_id, "sh", "-c", "id -u; pwd; echo $GREETING $HOME; hostname")
    assert output.split() == ["1000", "/tmp", "hello", "/home/user", pod.config.hostname]


def test_capabilities_and_limits_hold(pod: Pod) -> None:
    config = container_config("main", "sleep", "1000")
    config.linux.security_context.capabilities.drop_capabilities.append("ALL")
    config.linux.security_context.no_new_privs = True
    container_id = pod.start(config)
    status = pod.agent.client.output(container_id, "cat", "/proc/self/status")
    values = dict(line.split(":", 1) for line in status.splitlines())
    assert values["CapEff"].strip() == "0" * 16
    assert values["NoNewPrivs"].strip() == "1"
    assert (
        pod.agent.client.output(container_id, "cat", "/proc/self/cgroup").splitlines()[0]
        == (pod.agent.client.output(container_id, "cat", "/proc/1/cgroup").splitlines()[0])
    )


def test_no_command_is_refused(pod: Pod) -> None:
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "command"):
        pod.agent.client.exec(pod.sleeping())


def test_many_at_once(pod: Pod) -> None:
    container_id = pod.sleeping()
    requests = [cri_pb2.ExecSyncRequest(container_id=container_id, cmd=["echo", str(number)]) for number in range(20)]
    calls = [pod.agent.client.future("ExecSync", request) for request in requests]
    assert [call.result().stdout for call in calls] == [b"%d\n" % number for number in range(20)]


def test_container_that_ends_takes_its_execs_along(agent: AgentProcess) -> None:
    pod = Pod.run(agent, sandbox_config(agent))
    container_id = pod.sleeping()
    request = cri_pb2.ExecSyncRequest(container_id=container_id, cmd=["sleep", "999"])
    call = agent.client.future("ExecSync", request)
    agent.client.stop(container_id)
    exited(agent, container_id)
    # Killed with the container, or it came too late to be started in it.
    error = call.exception(timeout=SOON)
    assert error is not None or call.result().exit_code == 137
