"""The container calls: lifecycle, identity, exit."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.conformance.conftest import MakeImage
from tests.integration.conformance.support import SLEEP, UNKNOWN_ID, Pod, exited, log_text, refused
from tests.support.agent import BUSYBOX, AgentProcess, wait_for
from tests.support.pods import container_config, sandbox_config


def test_status_through_the_life_of_a_container(pod: Pod) -> None:
    client = pod.agent.client
    config = container_config("main", *SLEEP, labels={"a": "b"}, annotations={"c": "\u0001\n{}"})
    config.metadata.attempt = 3
    config.linux.resources.cpu_shares = 512
    container_id = pod.create(config)
    created = client.status(container_id)
    assert (created.state, created.started_at, created.finished_at) == (cri_pb2.CONTAINER_CREATED, 0, 0)
    assert (created.metadata, dict(created.labels)) == (config.metadata, {"a": "b"})
    assert dict(created.annotations) == {"c": "\u0001\n{}"}
    assert created.image.image == BUSYBOX
    assert created.image_id.startswith("sha256:")
    assert created.log_path == f"{pod.config.log_directory}/main/0.log"
    assert created.resources.linux.cpu_shares == 512
    assert created.stop_signal == cri_pb2.SIGNAL_SIGTERM
    client.start(container_id)
    running = client.status(container_id)
    assert running.state == cri_pb2.CONTAINER_RUNNING
    assert created.created_at == running.created_at < running.started_at <= time.time_ns()
    assert (running.finished_at, running.exit_code, running.reason) == (0, 0, "")
    client.stop(container_id)
    ended = client.status(container_id)
    assert (ended.state, ended.exit_code, ended.reason, ended.message) == (
        cri_pb2.CONTAINER_EXITED,
        137,
        "Error",
        "",
    )
    assert running.started_at == ended.started_at <= ended.finished_at <= time.time_ns()


def test_verbose_status_is_json(pod: Pod) -> None:
    container_id = pod.sleeping()
    request = cri_pb2.ContainerStatusRequest(container_id=container_id, verbose=True)
    information = json.loads(pod.agent.client.call("ContainerStatus", request).info["info"])
    assert information["sandboxID"] == pod.id
    assert information["pid"] > 1
    assert information["runtimeSpec"]["process"]["args"] == list(SLEEP)


@pytest.mark.parametrize("code", [0, 1, 42, 255])
def test_exit_codes(pod: Pod, code: int) -> None:
    status = pod.finished(container_config("main", "sh", "-c", f"exit {code}"))
    assert (status.exit_code, status.reason) == (code, "Error" if code else "Completed")


def test_death_by_signal_is_128_and_its_number(pod: Pod) -> None:
    status = pod.finished(container_config("main", "sh", "-c", "sh -c 'kill -ABRT $$'; exit $?"))
    assert status.exit_code == 134
    container_id = pod.start(container_config("waits", "sh", "-c", "trap : USR1; while :; do sleep 0.05; done"))
    pod.agent.client.stop(container_id)
    assert pod.agent.client.status(container_id).exit_code == 137


@pytest.mark.parametrize("command", ["/no/such/program", "nosuchprogram", "/etc/passwd", "/etc"])
def test_what_cannot_be_run_fails_the_start(pod: Pod, command: str) -> None:
    client = pod.agent.client
    container_id = pod.create(container_config("main", command))
    assert client.status(container_id).state == cri_pb2.CONTAINER_CREATED
    with pytest.raises(grpc.RpcError) as raised:
        client.start(container_id)
    assert command in (raised.value.details() or "")
    status = client.status(container_id)
    assert (status.state, status.exit_code) == (cri_pb2.CONTAINER_EXITED, 128)
    assert status.reason in ("StartError", "ContainerCannotRun")
    assert command in status.message
    assert status.finished_at >= status.started_at > 0
    client.stop(container_id)
    client.remove(container_id)


def test_calls_in_the_wrong_state(pod: Pod) -> None:
    client = pod.agent.client
    created = pod.create(container_config("created", *SLEEP))
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "created"):
        client.exec(created, "true")
    running = pod.sleeping("running")
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "running"):
        client.start(running)
    client.stop(running)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "exited"):
        client.start(running)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "exited"):
        client.exec(running, "true")
    for call in (client.start, client.status, lambda unknown: client.exec(unknown, "true")):
        with refused(grpc.StatusCode.NOT_FOUND, UNKNOWN_ID):
            call(UNKNOWN_ID)
    pod.agent.client.stop_sandbox(pod.id)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "not ready"):
        pod.create(container_config("late", *SLEEP))
    with refused(grpc.StatusCode.NOT_FOUND, UNKNOWN_ID):
        client.create(UNKNOWN_ID, container_config("late", *SLEEP), pod.config)


def test_created_container_is_stopped_and_removed(pod: Pod) -> None:
    client = pod.agent.client
    container_id = pod.create(container_config("main", *SLEEP))
    for _ in range(2):
        client.stop(container_id, timeout=5)
    assert client.status(container_id).state == cri_pb2.CONTAINER_EXITED
    for _ in range(2):
        client.remove(container_id)
    with refused(grpc.StatusCode.NOT_FOUND):
        client.status(container_id)


def test_running_container_is_removed(pod: Pod) -> None:
    container_id = pod.sleeping()
    pod.agent.client.remove(container_id)
    with refused(grpc.StatusCode.NOT_FOUND):
        pod.agent.client.status(container_id)


def test_removal_leaves_the_log(pod: Pod) -> None:
    status = pod.finished(container_config("main", "echo", "kept"))
    pod.agent.client.remove(status.id)
    assert log_text(status.log_path) == "kept\n"


def test_same_identity_same_container(pod: Pod) -> None:
    client, config = pod.agent.client, container_config("main", *SLEEP)
    with ThreadPoolExecutor(4) as threads:
        ids = set(threads.map(lambda _: pod.create(config), range(4)))
    assert ids == {pod.create(config)}
    with refused(grpc.StatusCode.ALREADY_EXISTS, "main"):
        pod.create(container_config("main", "sleep", "1"))
    for container_id in ids:
        client.stop(container_id)
    with refused(grpc.StatusCode.ALREADY_EXISTS, "attempt"):
        pod.create(config)
    config.metadata.attempt = 1
    assert pod.create(config) not in ids


def test_stop_with_a_shorter_grace_shortens_the_wait(pod: Pod) -> None:
    client = pod.agent.client
    container_id = pod.start(container_config("main", "sh", "-c", "trap '' TERM; while :; do sleep 0.05; done"))
    request = cri_pb2.StopContainerRequest(container_id=container_id, timeout=55)
    waiting = client.future("StopContainer", request)
    begin = time.monotonic()
    client.stop(container_id, timeout=1)
    waiting.result()
    assert time.monotonic() - begin < 50  # the first grace would take 55 s
    assert client.status(container_id).exit_code == 137


def test_stop_signal_of_configuration_before_that_of_image(pod: Pod, image: MakeImage) -> None:
    reference = image("stopsignal", {"StopSignal": "SIGUSR1"})
    script = "trap 'exit 10' USR1; trap 'exit 12' USR2; trap 'exit 15' TERM; while :; do sleep 0.05; done"
    given = container_config("given", "sh", "-c", script, image=reference, stop_signal=cri_pb2.SIGNAL_SIGUSR2)
    for config, code, number in (
        (container_config("image", "sh", "-c", script, image=reference), 10, cri_pb2.SIGNAL_SIGUSR1),
        (given, 12, cri_pb2.SIGNAL_SIGUSR2),
        (container_config("plain", "sh", "-c", script), 15, cri_pb2.SIGNAL_SIGTERM),
    ):
        container_id = pod.start(config)
        wait_for(lambda one=container_id: _traps(pod, one), what="the traps")
        assert pod.agent.client.status(container_id).stop_signal == number
        pod.agent.client.stop(container_id, timeout=20)
        assert pod.agent.client.status(container_id).exit_code == code


def _traps(pod: Pod, container_id: str) -> bool:
    caught = pod.agent.client.output(container_id, "grep", "SigCgt", "/proc/1/status").split()[1]
    return bool(int(caught, 16) & 1 << 14)


def test_out_of_memory_is_reported_exactly(pod: Pod) -> None:
    for name, script in (("own", "exec tail /dev/zero"), ("child", "tail /dev/zero; exit $?")):
        config = container_config(name, "sh", "-c", script)
        config.linux.resources.memory_limit_in_bytes = 16 << 20
        status = pod.finished(config)
        assert (status.exit_code, status.reason, status.message) == (137, "OOMKilled", "")


@pytest.mark.parametrize(
    ("ending", "code"),
    [("kill -TERM $$; exit 143", 143), ("exit 143", 143), ("exit 1", 1), ("exec sh -c 'exit 3'", 3)],
)
def test_own_end_after_a_child_was_killed_for_memory_is_an_error(pod: Pod, ending: str, code: int) -> None:
    """The kernel's kill of a child is not why the container ended."""
    config = container_config("main", "sh", "-c", f"sh -c 'exec tail /dev/zero'; echo $?; {ending}")
    config.linux.resources.memory_limit_in_bytes = 16 << 20
    status = pod.finished(config)
    assert "137" in log_text(status.log_path)
    assert (status.exit_code, status.reason) == (code, "Error")


def test_stop_after_a_child_was_killed_for_memory_is_an_error(pod: Pod) -> None:
    script = "trap '' TERM; sh -c 'exec tail /dev/zero'; echo child $?; while :; do sleep 0.1; done"
    config = container_config("main", "sh", "-c", script)
    config.linux.resources.memory_limit_in_bytes = 16 << 20
    container_id = pod.start(config)
    path = pod.agent.client.status(container_id).log_path
    wait_for(lambda: "child 137" in log_text(path), what="the child's end")
    pod.agent.client.stop(container_id, timeout=0)
    status = pod.agent.client.status(container_id)
    assert (status.exit_code, status.reason) == (137, "Error")


def test_other_containers_do_not_end_as_out_of_memory(pod: Pod) -> None:
    config = container_config("main", "sh", "-c", "kill -9 $$; sh -c 'kill -9 $$'; exit 137")
    config.linux.resources.memory_limit_in_bytes = 16 << 20
    status = pod.finished(config)
    assert (status.exit_code, status.reason) == (137, "Error")


@pytest.mark.parametrize("short", ["busybox", "busybox:latest", "library/busybox", "docker.io/library/busybox"])
def test_image_by_short_names(pod: Pod, short: str) -> None:
    container_id = pod.create(container_config("main", *SLEEP, image=short))
    assert pod.agent.client.status(container_id).image.image == short


def test_image_by_id_keeps_the_name_the_user_gave(pod: Pod) -> None:
    image_id = pod.agent.client.call(
        "ImageStatus", cri_pb2.ImageStatusRequest(image=cri_pb2.ImageSpec(image=BUSYBOX))
    ).image.id
    for number, given in enumerate((image_id, image_id.removeprefix("sha256:"), image_id[:20])):
        config = container_config(f"c{number}", *SLEEP, image=given)
        config.image.user_specified_image = "busybox:latest"
        status = pod.agent.client.status(pod.create(config))
        assert (status.image_id, status.image.image) == (image_id, "busybox:latest")


def test_absent_image_is_not_found(pod: Pod) -> None:
    with refused(grpc.StatusCode.NOT_FOUND, "no/such"):
        pod.create(container_config("main", *SLEEP, image="no/such:1"))


def test_client_that_goes_away_leaves_no_container(pod: Pod) -> None:
    config = container_config("main", *SLEEP)
    request = cri_pb2.CreateContainerRequest(pod_sandbox_id=pod.id, config=config, sandbox_config=pod.config)
    folder = pod.agent.run / "containers"
    creation = pod.agent.client.future("CreateContainer", request)
    wait_for(lambda: any(folder.iterdir()), what="a creation that is under way")
    assert creation.cancel()
    wait_for(lambda: not any(folder.iterdir()), what="the end of the creation")
    container_id = pod.create(config)
    (item,) = pod.agent.client.call("ListContainers", cri_pb2.ListContainersRequest()).containers
    assert item.id == container_id


def test_privileged_container_needs_a_privileged_pod(agent: AgentProcess) -> None:
    pod = Pod.run(agent, sandbox_config(agent))
    config = container_config("main", *SLEEP)
    config.linux.security_context.privileged = True
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "privileged"):
        pod.create(config)


def test_twenty_restarts_of_one_container(pod: Pod) -> None:
    """As kubelet does it: a new attempt, then the old one removed."""
    for attempt in range(20):
        config = container_config("main", "true")
        config.metadata.attempt = attempt
        config.log_path = f"main/{attempt}.log"
        status = pod.finished(config)
        assert (status.metadata.attempt, status.reason) == (attempt, "Completed")
        pod.agent.client.remove(status.id)


def test_end_right_after_the_start_is_not_lost(pod: Pod) -> None:
    ids = [pod.create(container_config(f"c{number}", "true")) for number in range(5)]
    for container_id in ids:
        pod.agent.client.start(container_id)
    assert all(exited(pod.agent, container_id).exit_code == 0 for container_id in ids)
