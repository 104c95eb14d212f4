"""With a full run folder, calls return an error, the agent can be restarted, and existing objects can be removed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from host import libc
from host.files import mounts
from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess
from tests.support.pods import run_container

_BYTES = 6 << 20


class _Filling:
    """Uses all space or all inodes of a file system until ``release``."""

    def __init__(self, folder: Path, *, inodes: bool) -> None:
        self._folder = folder / "filling"
        self._inodes = inodes

    def fill(self) -> None:
        self._folder.mkdir(exist_ok=True)
        with contextlib.suppress(OSError):
            for number in range(100_000):
                file = self._folder / str(number)
                if self._inodes:
                    file.touch()
                elif number:
                    with (self._folder / "0").open("ab", buffering=0) as grown:
                        while grown.write(bytes(4096)) == 4096:
                            pass

    def release(self) -> None:
        for file in self._folder.iterdir():
            file.unlink()
        self._folder.rmdir()


@pytest.fixture(params=["space", "inodes"])
def small(request: pytest.FixtureRequest, tmp_path: Path, busybox: Path) -> Iterator[tuple[AgentProcess, _Filling]]:
    agent = AgentProcess(tmp_path)
    agent.run.mkdir()
    libc.mount("small", str(agent.run), "tmpfs", mounts.MS_NOSUID, f"mode=0711,size={_BYTES},nr_inodes=400")
    filling = _Filling(agent.run, inodes=request.param == "inodes")
    try:
        agent.start()
        agent.import_busybox(busybox)
        yield agent, filling
    finally:
        agent.kill()
        with contextlib.suppress(FileNotFoundError):
            filling.release()
        agent.reset()


def test_an_agent_with_a_full_run_folder(small: tuple[AgentProcess, _Filling]) -> None:
    agent, filling = small
    _, container_id = run_container(agent, "sleep", "1000")
    filling.fill()
    with pytest.raises(grpc.RpcError) as refused:
        for _ in range(20):  # pods alone use only inodes
            run_container(agent, "sleep", "1000")
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, refused.value.details()
    assert "No space left" in refused.value.details() or "no space" in refused.value.details()
    before = agent.log.stat().st_size
    agent.restart()
    filling.fill()
    assert agent.client.status(container_id).state == cri_pb2.CONTAINER_RUNNING
    handlers = agent.client.call("Status", cri_pb2.StatusRequest()).runtime_handlers
    assert {handler.name for handler in handlers} >= {"", "crun"}
    assert "Traceback" not in agent.log.read_text()[before:]
    agent.client.stop(container_id, 0)
    status = agent.client.status(container_id)
    assert (status.exit_code, status.message) == (137, "")
    agent.client.remove(container_id)
    containers = agent.client.call("ListContainers", cri_pb2.ListContainersRequest()).containers
    assert container_id not in [container.id for container in containers]
    for pod in agent.client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest()).items:
        agent.client.stop_sandbox(pod.id)
        agent.client.remove_sandbox(pod.id)
    filling.release()
    agent.restart()
    run_container(agent, "true")
    assert agent.client.findings() == []
    assert os.statvfs(agent.run).f_bavail * os.statvfs(agent.run).f_frsize < _BYTES - (1 << 20)
