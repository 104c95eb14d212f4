"""CheckpointContainer: the content of the archive; the container continues in every case."""

from __future__ import annotations

import io
import tarfile
import threading
from pathlib import Path

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess, wait_for
from tests.support.checkpoints import (
    COUNTER,
    checkpoint,
    content,
    document,
    members,
    memory_of,
    nothing_is_left,
    run_with,
    wait_for_lines,
    wait_for_nothing_left,
)
from tests.support.pods import POLITE, wait_for_log

# Holds 300 MiB of memory: tail keeps its input, and its output is not read. (A checkpoint interrupts the sleep of a
# process, so nothing may depend on a single one.)
_NOBODY_READS = "(while :; do sleep 1; done)"
LARGE = (
    "sh",
    "-c",
    f"(head -c 300m /dev/zero | tail -c 300m | {_NOBODY_READS}) & i=0; while :; do echo $i; sleep 0.02; done",
)
LARGE_BYTES = 300 << 20


def test_the_archive_holds_what_tools_read(agent: AgentProcess, handler: str, tmp_path: Path) -> None:
    sandbox_id, container_id = run_with(agent, handler, *COUNTER)
    wait_for_lines(agent, container_id, 5)
    archive = tmp_path / "checkpoint.tar"
    checkpoint(agent, container_id, archive)

    assert archive.stat().st_mode & 0o7777 == 0o600
    wait_for_lines(agent, container_id, 5)  # it runs on
    status = agent.client.status(container_id)
    assert status.state == cri_pb2.CONTAINER_RUNNING
    assert list(tmp_path.iterdir()) == [archive]

    names = members(archive)
    for name in ("config.dump", "spec.dump", "status.dump", "rootfs-diff.tar", "deleted.files", "container.log"):
        assert names[name].isreg(), name
    for name in ("dump.log", "stats-dump", "network.status", "bind.mounts", "devshm-checkpoint.tar"):
        assert names[name].isreg(), name
    assert names["checkpoint"].isdir()
    assert {"checkpoint/inventory.img", "checkpoint/pstree.img", "checkpoint/descriptors.json"} <= set(names)

    config = document(archive, "config.dump")
    assert config["id"] == container_id
    assert config["name"] == "main"
    assert config["rootfsImageName"] == "docker.io/library/busybox:latest"
    assert config["rootfsImageRef"] == status.image_ref
    assert config["rootfsImage"] == status.image_id
    assert config["runtime"] == handler
    assert config["checkpointedTime"] > config["createdTime"] > config["restoredTime"]
    assert document(archive, "spec.dump")["process"]["args"] == list(COUNTER)
    assert document(archive, "status.dump")["metadata"]["name"] == "main"
    addresses = agent.client.call("PodSandboxStatus", cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=sandbox_id))
    assert document(archive, "network.status")["addresses"] == [addresses.status.network.ip]
    assert "/etc/hosts" in [mount["destination"] for mount in document(archive, "bind.mounts")]
    assert content(archive, "container.log").count(b"\n") >= 5


def test_the_archive_holds_what_the_container_changed(agent: AgentProcess, handler: str, tmp_path: Path) -> None:
    script = (
        "mkdir -p /made; echo new > /made/file; ln /made/file /made/again; ln -s file /made/link;"
        " chmod 4755 /made/file; chown 7:8 /made/again; rm /etc/passwd; rm -r /var; mkdir /var; echo it > /var/it;"
        " echo ready; sleep 1000"
    )
    _, container_id = run_with(agent, handler, "sh", "-c", script)
    wait_for_log(agent.client, container_id)
    archive = tmp_path / "checkpoint.tar"
    checkpoint(agent, container_id, archive)
    with tarfile.open(fileobj=io.BytesIO(content(archive, "rootfs-diff.tar"))) as diff:
        found = {member.name: member for member in diff}
        files = [found["made/file"], found["made/again"]]
        plain, linked = files if files[0].isreg() else files[::-1]
        assert linked.islnk()
        assert linked.linkname == plain.name
        assert (plain.uid, plain.gid, plain.mode & 0o777) == (7, 8, 0o755)
        assert found["made/link"].linkname == "file"
        assert diff.extractfile(plain).read() == b"new\n"  # type: ignore[union-attr]  # it is a file
        assert found["var/it"].isreg()
    assert "etc/passwd" not in found
    removed = document(archive, "deleted.files")
    assert "etc/passwd" in removed
    assert [path for path in removed if path.startswith("var/")]  # what the image has there and is no more
    assert "var/it" not in removed


def test_what_an_image_keeps_in_volumes_and_the_pod_in_shared_memory(
    agent: AgentProcess, handler: str, tmp_path: Path
) -> None:
    _, container_id = run_with(agent, handler, "sh", "-c", "echo kept > /dev/shm/it; echo ready; sleep 1000")
    wait_for_log(agent.client, container_id)
    archive = tmp_path / "checkpoint.tar"
    checkpoint(agent, container_id, archive)
    with tarfile.open(fileobj=io.BytesIO(content(archive, "devshm-checkpoint.tar"))) as shared:
        assert shared.extractfile("it").read() == b"kept\n"  # type: ignore[union-attr]  # it is a file


def test_only_a_running_container_and_a_place_for_a_file(agent: AgentProcess, crun: str, tmp_path: Path) -> None:
    _, container_id = run_with(agent, crun, "sh", "-c", "exit 0")
    wait_for(lambda: agent.client.status(container_id).state == cri_pb2.CONTAINER_EXITED, what="its end")
    with pytest.raises(grpc.RpcError) as failure:
        checkpoint(agent, container_id, tmp_path / "it.tar")
    assert failure.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "only a running one" in failure.value.details()
    _, running = run_with(agent, crun, *POLITE)
    folder = tmp_path / "folder"
    folder.mkdir()
    for location, code in (
        ("relative.tar", grpc.StatusCode.INVALID_ARGUMENT),
        ("", grpc.StatusCode.INVALID_ARGUMENT),
        (str(folder), grpc.StatusCode.INVALID_ARGUMENT),
        (f"{tmp_path}/missing/it.tar", grpc.StatusCode.NOT_FOUND),
    ):
        request = cri_pb2.CheckpointContainerRequest(container_id=running, location=location)
        with pytest.raises(grpc.RpcError) as failure:
            agent.client.call("CheckpointContainer", request)
        assert failure.value.code() is code, failure.value.details()
    with pytest.raises(grpc.RpcError) as failure:
        checkpoint(agent, "f" * 64, tmp_path / "it.tar")
    assert failure.value.code() is grpc.StatusCode.NOT_FOUND
    folder.rmdir()
    nothing_is_left(agent, tmp_path)


def test_a_checkpoint_beyond_its_time_leaves_nothing_and_the_container_running(
    agent: AgentProcess, crun: str, tmp_path: Path
) -> None:
    _, container_id = run_with(agent, crun, *LARGE)
    wait_for(lambda: memory_of(agent, container_id) > LARGE_BYTES, what="its memory", seconds=30)
    with pytest.raises(grpc.RpcError) as failure:
        agent.client.call(
            "CheckpointContainer",
            cri_pb2.CheckpointContainerRequest(container_id=container_id, location=str(tmp_path / "it.tar")),
            timeout=0.25,
        )
    assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_for_lines(agent, container_id, 5)
    wait_for_nothing_left(agent, tmp_path)
    assert memory_of(agent, container_id) > LARGE_BYTES
    checkpoint(agent, container_id, tmp_path / "it.tar", timeout=60)  # and it can still be checkpointed
    assert (tmp_path / "it.tar").stat().st_size > LARGE_BYTES
    wait_for_lines(agent, container_id, 5)
    assert memory_of(agent, container_id) > LARGE_BYTES


def test_a_stop_cancels_the_checkpoint_and_sends_the_stop_signal(
    agent: AgentProcess, crun: str, tmp_path: Path
) -> None:
    script = f"trap 'exit 3' TERM; {LARGE[2]}"
    _, container_id = run_with(agent, crun, "sh", "-c", script)
    wait_for(lambda: memory_of(agent, container_id) > LARGE_BYTES, what="its memory", seconds=30)
    request = cri_pb2.CheckpointContainerRequest(container_id=container_id, location=str(tmp_path / "it.tar"))
    call = agent.client.future("CheckpointContainer", request)
    wait_for(lambda: any((agent.data / "checkpoints").glob("*/checkpoint/*")), what="CRIU's images")
    agent.client.stop(container_id, 20)
    assert agent.client.status(container_id).exit_code == 3
    assert call.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "stopped" in call.details()
    nothing_is_left(agent, tmp_path)


def test_two_at_a_time_are_refused(agent: AgentProcess, crun: str, tmp_path: Path) -> None:
    _, container_id = run_with(agent, crun, *COUNTER)
    wait_for_lines(agent, container_id)
    codes: list[grpc.StatusCode | None] = []

    def one(number: int) -> None:
        try:
            checkpoint(agent, container_id, tmp_path / f"{number}.tar")
            codes.append(None)
        except grpc.RpcError as error:
            codes.append(error.code())

    threads = [threading.Thread(target=one, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes.count(None) == 1
    assert codes.count(grpc.StatusCode.FAILED_PRECONDITION) == 3
    assert len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_saved_is_named(agent: AgentProcess, crun: str, tmp_path: Path) -> None:
    script = "head -c 80m /dev/zero > /large; exec 5</large; rm /large; echo ready; while :; do sleep 0.05; done"
    _, container_id = run_with(agent, crun, "sh", "-c", script)
    wait_for_log(agent.client, container_id)
    with pytest.raises(grpc.RpcError) as failure:
        checkpoint(agent, container_id, tmp_path / "it.tar")
    assert failure.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "a process has a large deleted file open (CRIU: " in failure.value.details()
    assert agent.client.status(container_id).state == cri_pb2.CONTAINER_RUNNING
    nothing_is_left(agent, tmp_path)
