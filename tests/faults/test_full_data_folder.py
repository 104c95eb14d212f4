"""With a full data folder, containers and pods can be stopped and removed, and the agent can be started again."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from host import libc
from host.files import mounts
from proto.runtime.v1 import cri_pb2
from tests.support.agent import BUSYBOX, AgentProcess
from tests.support.pods import container_config, remove_all_pods, run_container, sandbox_config

_BYTES = 32 << 20
_INODES = 900


@pytest.fixture
def small(request: pytest.FixtureRequest, tmp_path: Path, busybox: Path) -> Iterator[AgentProcess]:
    """An agent with little space, or few inodes if the parameter is ``nr_inodes``."""
    agent = AgentProcess(tmp_path)
    agent.data.mkdir()
    few = f",nr_inodes={_INODES}" if getattr(request, "param", "") == "nr_inodes" else ""
    libc.mount("small", str(agent.data), "tmpfs", mounts.MS_NOSUID, f"mode=0711,size={_BYTES}{few}")
    try:
        agent.start()
        agent.import_busybox(busybox)
        yield agent
    finally:
        agent.kill()
        _free_space(agent)
        agent.reset()


def _fill(agent: AgentProcess) -> None:
    """Use all space and all inodes."""
    filling = agent.data / "filling"
    filling.mkdir(exist_ok=True)
    with contextlib.suppress(OSError), (filling / "space").open("ab", buffering=0) as file:
        while file.write(bytes(4096)) == 4096:
            pass
    with contextlib.suppress(OSError):
        for number in range(_INODES):
            (filling / str(number)).touch()


def _free_space(agent: AgentProcess) -> None:
    shutil.rmtree(agent.data / "filling", ignore_errors=True)


def _listed(agent: AgentProcess) -> list[str]:
    containers = agent.client.call("ListContainers", cri_pb2.ListContainersRequest()).containers
    return [container.id for container in containers]


@pytest.mark.parametrize("small", ["size", "nr_inodes"], indirect=True)
def test_pods_on_a_full_disk_can_be_removed(small: AgentProcess) -> None:
    """As kubelet does to free space. The store reserves space for this and for the next start."""
    config = sandbox_config(small)
    sandbox_id = small.client.run_sandbox(config)
    made = [small.client.create(sandbox_id, container_config(f"c{n}", "sleep", "1000"), config) for n in range(6)]
    for container_id in made[:4]:
        small.client.start(container_id)
    _fill(small)
    small.client.stop(made[0], 0)
    small.client.remove(made[1])
    small.client.remove(made[5])
    small.restart()
    _fill(small)
    assert small.client.status(made[0]).exit_code == 137
    assert small.client.output(made[2], "echo", "runs") == "runs\n"
    image = cri_pb2.ImageSpec(image=BUSYBOX)
    small.client.call("RemoveImage", cri_pb2.RemoveImageRequest(image=image))
    assert not small.client.call("ImageStatus", cri_pb2.ImageStatusRequest(image=image)).HasField("image")
    small.client.stop_sandbox(sandbox_id)
    small.client.remove_sandbox(sandbox_id)
    assert _listed(small) == []
    _fill(small)
    small.stop()
    _fill(small)
    small.start()
    assert small.client.findings() == []


def test_pods_that_a_full_store_cannot_remove_are_listed(small: AgentProcess) -> None:
    """Also if pods with very large annotations have used the space that the store reserves."""
    client = small.client
    config = sandbox_config(small)
    sandbox_id = client.run_sandbox(config)
    made = [client.create(sandbox_id, container_config(f"c{n}", "sleep", "1000"), config) for n in range(4)]
    _fill(small)
    with pytest.raises(grpc.RpcError) as full:
        for _ in range(100):
            client.run_sandbox(sandbox_config(small, annotations={"much": "x" * 500_000}))
    assert full.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, full.value.details()
    refused = []
    for container_id in made:
        try:
            client.remove(container_id)
            assert container_id not in _listed(small)
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, error.details()
            assert container_id in _listed(small)
            refused.append(container_id)
    assert refused, "the store was never full"
    _free_space(small)
    for container_id in refused:
        client.remove(container_id)
    assert _listed(small) == []
    remove_all_pods(client)
    assert client.findings() == []


def test_a_copy_of_the_store_that_a_full_disk_prevents_adopting_stays(small: AgentProcess) -> None:
    _, container_id = run_container(small, "sleep", "1000")
    small.stop()
    for file in small.data.glob("podkeel.db*"):
        file.unlink()
    shutil.rmtree(small.data / "reserve")  # otherwise there is space for the start
    _fill(small)
    for more, parts in (
        ((), ["--adopt", "podkeel-copy.db"]),
        (("--adopt",), ["free some space", "nothing was changed"]),
    ):
        command = small.command("serve", *more, *small.flags)
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert [part for part in parts if part not in done.stderr] == [], done.stderr
        assert "damaged" not in done.stderr
    _free_space(small)
    adopting = subprocess.Popen(small.command("serve", "--adopt", *small.flags), stderr=subprocess.DEVNULL)
    try:
        small.connect()
        assert small.client.status(container_id).state == cri_pb2.CONTAINER_RUNNING
        assert small.client.findings() == []
    finally:
        adopting.terminate()
        adopting.wait(timeout=30)
