"""CheckpointPod: several containers are saved at one moment, and continue in every case."""

from __future__ import annotations

import json
import stat
import subprocess
import threading
from pathlib import Path

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.checkpoint.test_container import LARGE, LARGE_BYTES
from tests.support.agent import AgentProcess, wait_for
from tests.support.checkpoints import (
    COUNTER,
    checkpoint_pod,
    memory_of,
    nothing_is_left,
    run_pod,
    wait_for_lines,
    wait_for_nothing_left,
)
from tests.support.pods import POLITE, container_config, sandbox_config, shared_pids, wait_for_log


def refusal(agent: AgentProcess, request: cri_pb2.CheckpointPodRequest) -> tuple[grpc.StatusCode, str]:
    """The code and message of the error."""
    with pytest.raises(grpc.RpcError) as failure:
        agent.client.call("CheckpointPod", request)
    return failure.value.code(), str(failure.value.details())


def test_a_whole_checkpoint(agent: AgentProcess, crun: str, tmp_path: Path) -> None:
    shared = "echo kept > /dev/shm/it; "
    first = container_config("first", "sh", "-c", shared + COUNTER[2])
    sandbox_id, ids = run_pod(agent, first, container_config("second", *COUNTER))
    for container_id in ids:
        wait_for_lines(agent, container_id, 3)
    checkpoint_pod(agent, sandbox_id, tmp_path, ids)
    for container_id in ids:
        wait_for_lines(agent, container_id, 3)  # they run on
    document = json.loads((tmp_path / "pod.json").read_text())
    assert document["version"] == 1
    assert document["frozenSeconds"] > 0
    assert [each["name"] for each in document["containers"]] == ["first", "second"]
    assert [each["id"] for each in document["containers"]] == ids
    assert document["pod"]["id"] == sandbox_id
    for each in document["containers"]:
        folder = tmp_path / each["folder"]
        assert (folder / "checkpoint" / "inventory.img").is_file()
        assert json.loads((folder / "config.dump").read_text())["name"] == each["name"]
        assert json.loads((folder / "deleted.files").read_text())
        for name in ("spec.dump", "status.dump", "rootfs-diff.tar", "dump.log", "stats-dump"):
            assert (folder / name).is_file(), name
        assert not (folder / "devshm-checkpoint.tar").exists()
    assert (tmp_path / "devshm-checkpoint.tar").is_file()
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 or "checkpoint" in path.parts[-2], path
        assert path.stat().st_uid == 0
    status = agent.client.call(
        "PodSandboxStatus", cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=sandbox_id, verbose=True)
    )
    information = json.loads(status.info["info"])
    stages = {stage["name"]: stage for stage in information["operations"][-1]["stages"]}
    assert {"reserve", "frozen", "freeze", "dump", "files", "thaw", "documents", "commit"} == set(stages)
    assert stages["frozen"]["seconds"] >= document["frozenSeconds"]
    assert information["checkpointing"] == []
    assert not any((agent.data / "checkpoints").iterdir())


def test_containers_that_were_not_selected_are_left_out(agent: AgentProcess, crun: str, tmp_path: Path) -> None:
    sandbox_id, ids = run_pod(agent, container_config("first", *POLITE), container_config("second", *POLITE))
    for container_id in ids:
        wait_for_log(agent.client, container_id)
    checkpoint_pod(agent, sandbox_id, tmp_path, ids[1:])
    document = json.loads((tmp_path / "pod.json").read_text())
    assert [each["name"] for each in document["containers"]] == ["second"]


def test_invalid_selections_and_paths_are_refused(agent: AgentProcess, crun: str, tmp_path: Path) -> None:
    sandbox_id, (running, ended) = run_pod(
        agent, container_config("runs", *POLITE), container_config("ends", "sh", "-c", "exit 0")
    )
    _, (other,) = run_pod(agent, container_config("other", *POLITE))
    wait_for(lambda: agent.client.status(ended).state == cri_pb2.CONTAINER_EXITED, what="its end")
    wait_for_log(agent.client, running)
    full, loose, link = tmp_path / "full", tmp_path / "loose", tmp_path / "link"
    for folder in (full, loose):
        folder.mkdir()
    (full / "file").touch()
    loose.chmod(0o777)
    link.symlink_to(full)
    empty = tmp_path / "empty"
    empty.mkdir()
    invalid, missing, state = (
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
    )
    for place, ids, options, code, words in (
        (empty, [], {}, invalid, "container_ids is empty"),
        (empty, [running, running], {}, invalid, "twice"),
        (empty, [running, other], {}, invalid, "is not of sandbox"),
        (empty, ["f" * 64], {}, missing, "f" * 64),
        (empty, [running, ended], {}, state, "only a running one"),
        (empty, [running], {"speed": "1"}, invalid, "'speed'"),
        (empty, [running], {"sessions": "end"}, invalid, "'end'"),
        ("", [running], {}, invalid, "not an absolute path"),
        ("relative", [running], {}, invalid, "not an absolute path"),
        (full / "file", [running], {}, invalid, "is not a folder"),
        (link, [running], {}, invalid, "is not a folder"),
        (loose, [running], {}, invalid, "by others than root"),
        (tmp_path / "missing", [running], {}, missing, "does not exist"),
        (full, [running], {}, state, "is not empty"),
    ):
        request = cri_pb2.CheckpointPodRequest(
            pod_sandbox_id=sandbox_id, output_path=str(place), container_ids=ids, options=options
        )
        found, message = refusal(agent, request)
        assert (found, words in message) == (code, True), message
    request.pod_sandbox_id = "e" * 64
    assert refusal(agent, request)[0] is missing
    assert list(full.iterdir()) == [full / "file"]
    nothing_is_left(agent, empty)


def test_pods_that_cannot_be_saved_are_named(agent: AgentProcess, crun: str, tmp_path: Path) -> None:
    found = {}
    for name in ("network", "ipc", "pid"):
        sandbox = sandbox_config(agent)
        config = container_config("main", *POLITE)
        for each in (sandbox, config):
            setattr(each.linux.security_context.namespace_options, name, cri_pb2.NODE)
        sandbox_id, ids = run_pod(agent, config, sandbox=sandbox)
        request = cri_pb2.CheckpointPodRequest(pod_sandbox_id=sandbox_id, output_path=str(tmp_path), container_ids=ids)
        found[name] = refusal(agent, request)
    terminal = container_config("main", "sleep", "1000", tty=True)
    sandbox_id, ids = run_pod(agent, terminal)
    request = cri_pb2.CheckpointPodRequest(pod_sandbox_id=sandbox_id, output_path=str(tmp_path), container_ids=ids)
    found["tty"] = refusal(agent, request)
    for name, words in (
        ("network", "uses the network of the node"),
        ("ipc", "uses the IPC namespace of the node"),
        ("pid", "uses the PID namespace of the node"),
        ("tty", "has a terminal"),
    ):
        assert found[name][0] is grpc.StatusCode.FAILED_PRECONDITION, name
        assert words in found[name][1]
    nothing_is_left(agent, tmp_path)


def test_what_criu_cannot_save_of_one_container(agent: AgentProcess, crun: str, tmp_path: Path) -> None:
    script = "head -c 80m /dev/zero > /large; exec 5</large; rm /large; echo ready; while :; do sleep 0.05; done"
    sandbox_id, ids = run_pod(agent, container_config("good", *COUNTER), container_config("bad", "sh", "-c", script))
    wait_for_log(agent.client, ids[1])
    request = cri_pb2.CheckpointPodRequest(pod_sandbox_id=sandbox_id, output_path=str(tmp_path), container_ids=ids)
    code, message = refusal(agent, request)
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "/bad) cannot be checkpointed: a process has a large deleted file open (CRIU: " in message
    wait_for_lines(agent, ids[0], 3)
    nothing_is_left(agent, tmp_path)


def test_sessions_prevent_a_checkpoint(agent: AgentProcess, crun: str, tmp_path: Path) -> None:
    sandbox_id, ids = run_pod(agent, container_config("main", *COUNTER))
    wait_for_lines(agent, ids[0])
    request = cri_pb2.CheckpointPodRequest(pod_sandbox_id=sandbox_id, output_path=str(tmp_path), container_ids=ids)
    command = cri_pb2.ExecSyncRequest(
        container_id=ids[0], cmd=("sh", "-c", "touch /begun; until test -e /end; do sleep 0.05; done")
    )
    running = agent.client.future("ExecSync", command)
    # The look is a command of exec itself, so it is made from outside.
    root = next(agent.run.glob(f"containers/{ids[0]}/rootfs"))
    wait_for((root / "begun").exists, what="the command")
    code, message = refusal(agent, request)
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "a command of exec runs in it" in message
    nothing_is_left(agent, tmp_path)
    (root / "end").touch()
    running.result()
    checkpoint_pod(agent, sandbox_id, tmp_path, ids)
    assert (tmp_path / "pod.json").is_file()


def test_attached_clients_prevent_a_checkpoint_or_are_left_out(agent: AgentProcess, crun: str, tmp_path: Path) -> None:
    sandbox_id, ids = run_pod(agent, container_config("main", *COUNTER))
    wait_for_lines(agent, ids[0])
    request = cri_pb2.CheckpointPodRequest(pod_sandbox_id=sandbox_id, output_path=str(tmp_path), container_ids=ids)
    command = agent.command("attach", "--socket", agent.address, ids[0])
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline()
        code, message = refusal(agent, request)
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "has attached clients: they cannot be saved" in message
        nothing_is_left(agent, tmp_path)
        checkpoint_pod(agent, sandbox_id, tmp_path, ids, sessions="leave-out")
        assert client.stdout.readline()
        client.kill()
    assert (tmp_path / "pod.json").is_file()
    wait_for_lines(agent, ids[0], 3)


def test_a_deadline_leaves_nothing_and_all_running(agent: AgentProcess, crun: str, tmp_path: Path) -> None:
    sandbox_id, ids = run_pod(agent, container_config("small", *COUNTER), container_config("large", *LARGE))
    wait_for(lambda: memory_of(agent, ids[1]) > LARGE_BYTES, what="its memory", seconds=30)
    request = cri_pb2.CheckpointPodRequest(pod_sandbox_id=sandbox_id, output_path=str(tmp_path), container_ids=ids)
    with pytest.raises(grpc.RpcError) as failure:
        agent.client.call("CheckpointPod", request, timeout=0.3)
    assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    for container_id in ids:
        wait_for_lines(agent, container_id, 5)
    wait_for_nothing_left(agent, tmp_path)
    assert memory_of(agent, ids[1]) > LARGE_BYTES
    checkpoint_pod(agent, sandbox_id, tmp_path, ids)
    for container_id in ids:
        wait_for_lines(agent, container_id, 5)


def test_a_checkpoint_in_progress_is_listed(agent: AgentProcess, crun: str, tmp_path: Path) -> None:
    sandbox_id, ids = run_pod(agent, container_config("small", *COUNTER), container_config("large", *LARGE))
    wait_for(lambda: memory_of(agent, ids[1]) > LARGE_BYTES, what="its memory", seconds=30)
    request = cri_pb2.CheckpointPodRequest(pod_sandbox_id=sandbox_id, output_path=str(tmp_path), container_ids=ids)
    call = agent.client.future("CheckpointPod", request)
    wait_for(lambda: any(tmp_path.glob("containers/1/checkpoint/*")) or call.done(), what="CRIU's images")
    status = cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=sandbox_id, verbose=True)
    information = json.loads(agent.client.call("PodSandboxStatus", status).info["info"])
    code, message = refusal(agent, request)
    if not call.done():  # it was not over when these were asked for
        assert information["checkpointing"] == ["small", "large"]
        assert information["operations"][-1]["name"] == "CheckpointPod"
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "another checkpoint of it is being made" in message
    call.result()
    for container_id in ids:
        wait_for_lines(agent, container_id, 3)


def test_a_stop_cancels_the_checkpoint(agent: AgentProcess, crun: str, tmp_path: Path) -> None:
    polite = container_config("polite", "sh", "-c", f"trap 'exit 3' TERM; {LARGE[2]}")
    sandbox_id, ids = run_pod(agent, container_config("other", *COUNTER), polite)
    wait_for(lambda: memory_of(agent, ids[1]) > LARGE_BYTES, what="its memory", seconds=30)
    request = cri_pb2.CheckpointPodRequest(pod_sandbox_id=sandbox_id, output_path=str(tmp_path), container_ids=ids)
    call = agent.client.future("CheckpointPod", request)
    wait_for(lambda: any(tmp_path.glob("containers/1/checkpoint/*")), what="CRIU's images")
    agent.client.stop(ids[1], 20)
    assert agent.client.status(ids[1]).exit_code == 3
    assert call.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "is being stopped" in call.details()
    wait_for_lines(agent, ids[0], 3)
    nothing_is_left(agent, tmp_path)


def test_a_paused_container_stays_paused(agent: AgentProcess, crun: str, tmp_path: Path) -> None:
    sandbox_id, ids = run_pod(agent, container_config("first", *COUNTER), container_config("second", *COUNTER))
    status = cri_pb2.ContainerStatusRequest(container_id=ids[1], verbose=True)
    cgroup = json.loads(agent.client.call("ContainerStatus", status).info["info"])["cgroup"].lstrip("/")
    version_1 = Path("/sys/fs/cgroup/freezer")
    if version_1.is_dir():
        switch, on, off = version_1 / cgroup / "freezer.state", "FROZEN", "THAWED"
    else:
        switch, on, off = Path("/sys/fs/cgroup") / cgroup / "cgroup.freeze", "1", "0"
    switch.write_text(on)
    try:
        wait_for(lambda: switch.read_text().strip() == on, what="its pause")
        request = cri_pb2.CheckpointPodRequest(pod_sandbox_id=sandbox_id, output_path=str(tmp_path), container_ids=ids)
        code, message = refusal(agent, request)
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "is paused" in message
        location = tmp_path.with_name("it.tar")
        with pytest.raises(grpc.RpcError, match="is paused"):
            agent.client.call(
                "CheckpointContainer",
                cri_pb2.CheckpointContainerRequest(container_id=ids[1], location=str(location)),
            )
        assert switch.read_text().strip() == on
    finally:
        switch.write_text(off)
    wait_for_lines(agent, ids[0], 3)
    nothing_is_left(agent, tmp_path)


STAGES = ("reserve:after", "freeze:after", "dump:after", "files:after", "frozen:after", "documents:after")


def test_killed_and_failing_at_every_stage(own_agent: AgentProcess, able: dict[str, str], tmp_path: Path) -> None:
    if able.get("crun") != "able":
        pytest.skip(f"crun cannot make checkpoints here: {able.get('crun')}")
    sandbox = sandbox_config(own_agent)
    configs = [container_config(name, *COUNTER) for name in ("first", "second")]
    shared_pids(sandbox)
    for config in configs:
        shared_pids(config)
    sandbox_id, ids = run_pod(own_agent, *configs, sandbox=sandbox)
    place, faults = tmp_path / "place", tmp_path / "faults"
    place.mkdir()
    faults.write_text("")
    own_agent.restart(f"@{faults}")
    for stage in STAGES:
        for fault in ("error", "kill"):
            faults.write_text(f"CheckpointPod.{stage}:{fault}")
            with pytest.raises(grpc.RpcError):
                checkpoint_pod(own_agent, sandbox_id, place, ids)
            faults.write_text("")
            if fault == "kill":
                own_agent.wait_dead()
                own_agent.start(f"@{faults}")
            for container_id in ids:
                assert own_agent.client.status(container_id).state == cri_pb2.CONTAINER_RUNNING, stage
                wait_for_lines(own_agent, container_id, 3)
            nothing_is_left(own_agent, place)
    faults.write_text("CheckpointPod.commit:after:kill")
    with pytest.raises(grpc.RpcError):
        checkpoint_pod(own_agent, sandbox_id, place, ids)
    own_agent.wait_dead()
    own_agent.start()
    assert (place / "pod.json").is_file()
    assert not any((own_agent.data / "checkpoints").iterdir())


def test_killed_while_criu_works(own_agent: AgentProcess, able: dict[str, str], tmp_path: Path) -> None:
    if able.get("crun") != "able":
        pytest.skip(f"crun cannot make checkpoints here: {able.get('crun')}")
    sandbox_id, ids = run_pod(own_agent, container_config("small", *COUNTER), container_config("large", *LARGE))
    wait_for(lambda: memory_of(own_agent, ids[1]) > LARGE_BYTES, what="its memory", seconds=30)

    place = tmp_path / "place"
    place.mkdir()

    def call() -> None:
        with pytest.raises(grpc.RpcError):
            checkpoint_pod(own_agent, sandbox_id, place, ids)

    thread = threading.Thread(target=call)
    thread.start()
    wait_for(lambda: any(place.glob("containers/1/checkpoint/pages-*.img")), what="pages")
    own_agent.kill()
    thread.join()
    own_agent.start()
    for container_id in ids:
        wait_for_lines(own_agent, container_id, 5)
    assert memory_of(own_agent, ids[1]) > LARGE_BYTES
    nothing_is_left(own_agent, place)
    checkpoint_pod(own_agent, sandbox_id, place, ids)
    assert (place / "pod.json").is_file()
