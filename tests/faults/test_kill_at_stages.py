"""SIGKILL to the agent before and after every stage of every operation, then a start: nothing incomplete stays."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from proto.podkeel.v1 import agent_pb2
from proto.runtime.v1 import cri_pb2
from tests.faults.conftest import FaultyAgent, Stage
from tests.faults.points import operations_without_stages, points, stages_without_operation
from tests.support.checkpoints import (
    abilities,
    checkpoint,
    checkpoint_pod,
    image_of,
    made_up,
    nothing_is_left,
    restore_pod,
)
from tests.support.pods import POLITE, container_config, sandbox_config, shared_pids, wait_for_log


def test_every_stage_in_the_source_is_tested() -> None:
    assert stages_without_operation() == []
    assert operations_without_stages() == set()
    tested = {point.partition(".")[0] for point in points()}
    assert tested == _SCENARIOS.keys()


@pytest.mark.parametrize("point", points())
def test_killed_at(stage: Stage, point: str) -> None:
    _SCENARIOS[point.partition(".")[0]](stage, point)


def _killed(agent: FaultyAgent, point: str, call: Callable[[], object]) -> None:
    """Make a call during which the agent is killed at ``point``, and start the agent again."""
    agent.plant(f"{point}:kill")
    with pytest.raises(grpc.RpcError):
        call()
    agent.revive()


def _container_of(stage: Stage, *, started: bool) -> tuple[str, str]:
    client = stage.agent.client
    sandbox = sandbox_config(stage.agent)
    container = container_config("main", *POLITE)
    shared_pids(sandbox)
    shared_pids(container)
    sandbox_id = client.run_sandbox(sandbox)
    container_id = client.create(sandbox_id, container, sandbox)
    if started:
        client.start(container_id)
        wait_for_log(client, container_id)
    return sandbox_id, container_id


def _sandboxes(stage: Stage) -> dict[str, int]:
    items = stage.agent.client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest()).items
    return {item.id: item.state for item in items if item.id != stage.bystander.sandbox_id}


def _containers(stage: Stage) -> dict[str, int]:
    items = stage.agent.client.call("ListContainers", cri_pb2.ListContainersRequest()).containers
    return {item.id: item.state for item in items if item.id != stage.bystander.container_id}


def _run_pod_sandbox(stage: Stage, point: str) -> None:
    sandbox = sandbox_config(stage.agent)
    sandbox.port_mappings.add(protocol=cri_pb2.TCP, container_port=80, host_port=28080)
    _killed(stage.agent, point, lambda: stage.agent.client.run_sandbox(sandbox))
    complete = point.endswith("commit:after")
    assert list(_sandboxes(stage).values()) == ([cri_pb2.SANDBOX_READY] if complete else [])
    stage.assert_whole()
    sandbox_id = stage.agent.client.run_sandbox(sandbox)
    assert list(_sandboxes(stage)) == [sandbox_id]


def _create_container(stage: Stage, point: str) -> None:
    client = stage.agent.client
    sandbox = sandbox_config(stage.agent)
    shared_pids(sandbox)
    sandbox_id = client.run_sandbox(sandbox)
    container = container_config("main", *POLITE)
    shared_pids(container)
    _killed(stage.agent, point, lambda: client.create(sandbox_id, container, sandbox))
    complete = point.endswith("commit:after")
    assert list(_containers(stage).values()) == ([cri_pb2.CONTAINER_CREATED] if complete else [])
    stage.assert_whole()
    container_id = stage.agent.client.create(sandbox_id, container, sandbox)
    assert list(_containers(stage)) == [container_id]
    stage.agent.client.start(container_id)
    assert stage.agent.client.output(container_id, "echo", "works") == "works\n"


def _start_container(stage: Stage, point: str) -> None:
    client = stage.agent.client
    _, container_id = _container_of(stage, started=False)
    _killed(stage.agent, point, lambda: client.start(container_id))
    started = not point.endswith("runtime:before")
    expected = cri_pb2.CONTAINER_RUNNING if started else cri_pb2.CONTAINER_CREATED
    assert _containers(stage) == {container_id: expected}
    if not started:
        stage.agent.client.start(container_id)
    assert stage.agent.client.status(container_id).started_at > 0
    assert stage.agent.client.output(container_id, "echo", "works") == "works\n"


def _stop_container(stage: Stage, point: str) -> None:
    client = stage.agent.client
    _, container_id = _container_of(stage, started=True)
    _killed(stage.agent, point, lambda: client.stop(container_id, timeout=20))
    stage.assert_whole()
    stage.agent.client.stop(container_id, timeout=20)
    status = stage.agent.client.status(container_id)
    assert (status.state, status.exit_code, status.reason) == (cri_pb2.CONTAINER_EXITED, 3, "Error")
    assert status.started_at < status.finished_at


def _remove_container(stage: Stage, point: str) -> None:
    client = stage.agent.client
    _, container_id = _container_of(stage, started=True)
    _killed(stage.agent, point, lambda: client.remove(container_id))
    if not point.endswith("intent:before"):
        assert _containers(stage) == {}
    stage.assert_whole()
    stage.agent.client.remove(container_id)
    assert _containers(stage) == {}


def _stop_pod_sandbox(stage: Stage, point: str) -> None:
    client = stage.agent.client
    sandbox_id, container_id = _container_of(stage, started=True)
    _killed(stage.agent, point, lambda: client.stop_sandbox(sandbox_id))
    stage.assert_whole()
    stage.agent.client.stop_sandbox(sandbox_id)
    assert _sandboxes(stage) == {sandbox_id: cri_pb2.SANDBOX_NOTREADY}
    assert _containers(stage) == {container_id: cri_pb2.CONTAINER_EXITED}
    assert stage.agent.client.status(container_id).exit_code == 137


def _remove_pod_sandbox(stage: Stage, point: str) -> None:
    client = stage.agent.client
    sandbox_id, _ = _container_of(stage, started=True)
    _killed(stage.agent, point, lambda: client.remove_sandbox(sandbox_id))
    if "containers" not in point and not point.endswith("intent:before"):
        assert _sandboxes(stage) == {}
    stage.assert_whole()
    stage.agent.client.remove_sandbox(sandbox_id)
    assert _sandboxes(stage) == {}
    assert _containers(stage) == {}


def _update_container_resources(stage: Stage, point: str) -> None:
    client = stage.agent.client
    _, container_id = _container_of(stage, started=True)
    limits = cri_pb2.LinuxContainerResources(memory_limit_in_bytes=64 << 20)
    request = cri_pb2.UpdateContainerResourcesRequest(container_id=container_id, linux=limits)
    _killed(stage.agent, point, lambda: client.call("UpdateContainerResources", request))
    stage.agent.client.call("UpdateContainerResources", request)
    assert stage.agent.client.status(container_id).resources.linux.memory_limit_in_bytes == 64 << 20


def _images(stage: Stage) -> set[str]:
    images = stage.agent.client.call("ListImages", cri_pb2.ListImagesRequest()).images
    return {tag for image in images for tag in image.repo_tags if "busybox" not in tag}


def _remove(stage: Stage, reference: str) -> None:
    request = cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image=reference))
    stage.agent.client.call("RemoveImage", request)


def _killed_while_adding(stage: Stage, point: str, reference: str, call: Callable[[], object]) -> None:
    _killed(stage.agent, point, call)
    assert _images(stage) == ({reference} if point.endswith("commit:after") else set())
    stage.assert_whole()
    call()
    assert _images(stage) == {reference}
    _remove(stage, reference)
    assert _images(stage) == set()


def _pull_image(stage: Stage, point: str) -> None:
    request = cri_pb2.PullImageRequest(image=cri_pb2.ImageSpec(image=stage.reference))
    _killed_while_adding(stage, point, stage.reference, lambda: stage.agent.client.call("PullImage", request))


def _import_image(stage: Stage, point: str) -> None:
    request = agent_pb2.ImportImageRequest(path=str(stage.archive))
    _killed_while_adding(
        stage, point, "example.org/imported:1", lambda: stage.agent.client.call("ImportImage", request)
    )


def _remove_image(stage: Stage, point: str) -> None:
    stage.agent.client.call("ImportImage", agent_pb2.ImportImageRequest(path=str(stage.archive)))
    _killed(stage.agent, point, lambda: _remove(stage, "example.org/imported:1"))
    assert _images(stage) == ({"example.org/imported:1"} if point.endswith("forget:before") else set())
    stage.assert_whole()
    _remove(stage, "example.org/imported:1")
    assert _images(stage) == set()


def _checkpoint_container(stage: Stage, point: str) -> None:
    why = abilities(stage.agent).get("crun", "it does not work here")
    if why != "able":
        pytest.skip(f"crun cannot make checkpoints here: {why}")
    _, container_id = _container_of(stage, started=True)
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder, "it.tar")
        _killed(stage.agent, point, lambda: checkpoint(stage.agent, container_id, archive))
        assert archive.exists() == point.endswith("commit:after")
        archive.unlink(missing_ok=True)
        nothing_is_left(stage.agent, Path(folder))
    assert stage.agent.client.output(container_id, "echo", "runs") == "runs\n"
    stage.assert_whole()


def _checkpoint_pod(stage: Stage, point: str) -> None:
    why = abilities(stage.agent).get("crun", "it does not work here")
    if why != "able":
        pytest.skip(f"crun cannot make checkpoints here: {why}")
    sandbox_id, container_id = _container_of(stage, started=True)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        _killed(stage.agent, point, lambda: checkpoint_pod(stage.agent, sandbox_id, place, [container_id]))
        if point.endswith("commit:after"):
            assert (place / "pod.json").is_file()
            work = stage.agent.data / "checkpoints"
            assert list(work.iterdir()) == []
        else:
            nothing_is_left(stage.agent, place)
    assert stage.agent.client.output(container_id, "echo", "runs") == "runs\n"
    stage.assert_whole()


def _restore_pod(stage: Stage, point: str) -> None:
    why = abilities(stage.agent).get("crun", "it does not work here")
    if why != "able":
        pytest.skip(f"crun cannot make checkpoints here: {why}")
    sandbox_id, container_id = _container_of(stage, started=True)
    config = container_config("main", *POLITE)
    shared_pids(config)
    sandbox = sandbox_config(stage.agent)
    shared_pids(sandbox)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        checkpoint_pod(stage.agent, sandbox_id, place, [container_id])
        stage.agent.client.stop_sandbox(sandbox_id)
        stage.agent.client.remove_sandbox(sandbox_id)
        _killed(stage.agent, point, lambda: restore_pod(stage.agent, place, config, sandbox=sandbox))
        assert list((stage.agent.data / "checkpoints").iterdir()) == []
        if point.endswith("commit:after"):
            assert list(_sandboxes(stage).values()) == [cri_pb2.SANDBOX_READY]
            (restored,) = _containers(stage)
        else:
            assert _sandboxes(stage) == {}
            assert _containers(stage) == {}
            stage.assert_whole()
            _, ids = restore_pod(stage.agent, place, config, sandbox=sandbox)
            restored = ids["main"]
    stage.agent.client.start(restored)
    assert stage.agent.client.output(restored, "echo", "runs") == "runs\n"
    stage.assert_whole()


def _image_from_checkpoint(stage: Stage, point: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        archive = made_up(Path(folder))
        _killed(stage.agent, point, lambda: image_of(stage.agent, archive))
        work = stage.agent.data / "checkpoints"
        assert not work.exists() or list(work.iterdir()) == []
        stage.assert_whole()
        name = image_of(stage.agent, archive)
    stage.agent.client.call("RemoveImage", cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image=name)))


_SCENARIOS: dict[str, Callable[[Stage, str], None]] = {
    "RunPodSandbox": _run_pod_sandbox,
    "StopPodSandbox": _stop_pod_sandbox,
    "RemovePodSandbox": _remove_pod_sandbox,
    "CreateContainer": _create_container,
    "StartContainer": _start_container,
    "StopContainer": _stop_container,
    "RemoveContainer": _remove_container,
    "CheckpointContainer": _checkpoint_container,
    "CheckpointPod": _checkpoint_pod,
    "RestorePod": _restore_pod,
    "ImageFromCheckpoint": _image_from_checkpoint,
    "UpdateContainerResources": _update_container_resources,
    "PullImage": _pull_image,
    "ImportImage": _import_image,
    "RemoveImage": _remove_image,
}
