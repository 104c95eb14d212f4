"""``podkeel checkpoint``, ``image from-checkpoint`` and ``restore``, as people use them; and kubelet's call."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from cli.manifest.manifest import MASKED_PATHS, READONLY_PATHS
from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess
from tests.support.checkpoints import COUNTER, lines_of, members, restore_pod, run_pod, run_with, wait_for_lines
from tests.support.pods import POLITE, container_config, sandbox_config


def podkeel(agent: AgentProcess, *words: str) -> str:
    command = agent.command(*words, "--socket", agent.address)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_container_moves_to_another_pod(agent: AgentProcess, crun: str, tmp_path: Path) -> None:
    (tmp_path / "volume").mkdir()
    mounts = [cri_pb2.Mount(host_path=str(tmp_path / "volume"), container_path="/data", readonly=True)]
    linux = cri_pb2.LinuxContainerConfig()
    linux.security_context.namespace_options.pid = cri_pb2.CONTAINER
    linux.security_context.masked_paths.extend(MASKED_PATHS)
    linux.security_context.readonly_paths.extend(READONLY_PATHS)
    sandbox_id, first = run_with(agent, crun, *COUNTER, mounts=mounts, linux=linux)
    wait_for_lines(agent, first, 10)
    archive = tmp_path / "web.tar"
    assert podkeel(agent, "checkpoint", first, str(archive)) == f"{archive}\n"
    reached = int(lines_of(agent, first)[-1])
    agent.client.remove_sandbox(sandbox_id)
    pod = agent.client.run_sandbox(sandbox_config(agent, "new-pod"), crun)
    volume = f"{tmp_path}/volume:/data:ro"
    second = podkeel(agent, "restore", "--volume", volume, str(archive), "new-pod").strip()
    numbers = [int(line) for line in wait_for_lines(agent, second, 5)]
    assert 5 < numbers[0] <= reached + 1
    status = agent.client.status(second)
    assert (status.metadata.name, status.state) == ("main", cri_pb2.CONTAINER_RUNNING)
    assert Path(status.log_path).name == "main-restored.log"
    third = podkeel(agent, "restore", "--name", "other", "--volume", volume, str(archive), pod[:12]).strip()
    wait_for_lines(agent, third, 3)
    assert agent.client.status(third).metadata.name == "other"


def test_a_pod_is_saved_to_a_folder(agent: AgentProcess, crun: str, tmp_path: Path) -> None:
    (tmp_path / "volume").mkdir()
    mounts = [cri_pb2.Mount(host_path=str(tmp_path / "volume"), container_path="/data", readonly=True)]
    envs = [cri_pb2.KeyValue(key="SECRET", value="\u00e4".encode())]
    configs = [container_config("first", *COUNTER, mounts=mounts, envs=envs), container_config("second", *COUNTER)]
    sandbox = sandbox_config(agent, "some-pod")
    sandbox_id, ids = run_pod(agent, *configs, sandbox=sandbox)
    agent.client.create(sandbox_id, container_config("created", *POLITE), sandbox)  # it does not run
    for container_id in ids:
        wait_for_lines(agent, container_id, 3)
    folder = tmp_path / "it"
    assert podkeel(agent, "checkpoint-pod", "some-pod", str(folder)) == f"{folder}\n"
    assert folder.stat().st_mode & 0o7777 == 0o700
    document = json.loads((folder / "pod.json").read_text())
    assert {each["id"] for each in document["containers"]} == set(ids)
    for container_id in ids:
        wait_for_lines(agent, container_id, 3)
    restored = restore_pod(agent, folder, *configs)[1]
    agent.client.start(restored["first"])
    wait_for_lines(agent, restored["first"], 3)
    pods = tmp_path / "pods"
    words = ("restore-pod", "--unmasked", "--pod-dir", str(pods), str(folder))
    assert "cannot be restored" in fails(agent, *words)  # without the volume
    assert list(pods.iterdir()) == []
    volume = ("--volume", f"first={tmp_path}/volume:/data:ro")
    pod = podkeel(agent, *words, *volume, "--name", "warm").strip()
    found = agent.client.call("ListContainers", cri_pb2.ListContainersRequest(filter={"pod_sandbox_id": pod}))
    assert sorted(each.metadata.name for each in found.containers) == ["first", "second"]
    for each in found.containers:
        assert each.state == cri_pb2.CONTAINER_RUNNING
        assert int(wait_for_lines(agent, each.id, 3)[0]) > 1
    (logs,) = pods.iterdir()
    assert logs.name.startswith("default_warm_")
    podkeel(agent, "rm", "--pod-dir", str(pods), "warm")
    assert list(pods.iterdir()) == []


def test_a_pod_that_is_not_saved_leaves_no_folder(agent: AgentProcess, tmp_path: Path) -> None:
    full, new = tmp_path / "full", tmp_path / "new"
    full.mkdir()
    (full / "file").touch()
    sandbox = sandbox_config(agent, "some-pod")
    sandbox.linux.security_context.namespace_options.network = cri_pb2.NODE
    sandbox_id = agent.client.run_sandbox(sandbox)
    assert "has no running container" in fails(agent, "checkpoint-pod", "some-pod", str(new))
    agent.client.start(agent.client.create(sandbox_id, container_config("main", *POLITE), sandbox))
    for folder in (full, new):
        assert "checkpoint pod 'some-pod'" in fails(agent, "checkpoint-pod", "some-pod", str(folder))
    assert "cannot be made: No such file" in fails(agent, "checkpoint-pod", "some-pod", str(new / "it"))
    assert "no-pod" in fails(agent, "checkpoint-pod", "no-pod", str(new))
    restore = ("restore-pod", "--pod-dir", str(new))
    assert "holds no checkpoint of a pod" in fails(agent, *restore, str(full))
    (full / "pod.json").write_text('{"version": 1, "machine": "x", "containers": [{"name": "a", "imageId": "b"}]}')
    assert "has no container 'c'" in fails(agent, *restore, "--volume", "c=/a:/b", str(full))
    assert "--volume a:/b: expected" in fails(agent, *restore, "--volume", "a:/b", str(full))
    (full / "pod.json").unlink()
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "file"]


def fails(agent: AgentProcess, *words: str) -> str:
    """What a command that fails says."""
    command = agent.command(*words, "--socket", agent.address)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_restore_that_fails_says_why(agent: AgentProcess, tmp_path: Path) -> None:
    agent.client.run_sandbox(sandbox_config(agent, "some-pod"))
    (tmp_path / "it.tar").write_bytes(b"x" * 1024)
    for words, told in (
        (("restore", str(tmp_path / "it.tar"), "some-pod"), "is broken or not a tar file"),
        (("restore", str(tmp_path / "missing.tar"), "some-pod"), "missing.tar"),
        (("restore", str(tmp_path / "it.tar"), "no-pod"), "no-pod"),
        (("restore", "--volume", "data", str(tmp_path / "it.tar"), "some-pod"), "--volume data: expected"),
        (("image", "from-checkpoint", str(tmp_path / "it.tar"), "example.org/it:1"), "is broken or not a tar file"),
    ):
        assert told in fails(agent, *words)


def test_the_call_of_kubelet(agent: AgentProcess, handler: str, tmp_path: Path) -> None:
    _, container_id = run_with(agent, handler, *COUNTER)
    wait_for_lines(agent, container_id, 3)
    folder = tmp_path / "checkpoints"
    folder.mkdir(mode=0o700)
    location = folder / "checkpoint-counter-5d8f_my-namespace-main-2026-05-04T12:13:14+02:00.tar"
    request = cri_pb2.CheckpointContainerRequest(container_id=container_id, location=str(location), timeout=0)
    answer = agent.client.call("CheckpointContainer", request, timeout=120)
    assert answer == cri_pb2.CheckpointContainerResponse()
    assert list(folder.iterdir()) == [location]
    assert (folder.stat().st_mode & 0o7777, location.stat().st_mode & 0o7777) == (0o700, 0o600)
    assert "checkpoint/pstree.img" in members(location)
    wait_for_lines(agent, container_id, 3)
