"""A data folder without space: what cannot be removed stays listed, and is removed once there is space."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from host import libc
from host.files import mounts
from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess
from tests.support.pods import container_config, run_container, sandbox_config

_BYTES = 24 << 20


@pytest.fixture
def small(tmp_path: Path, busybox: Path) -> Iterator[AgentProcess]:
    agent = AgentProcess(tmp_path)
    agent.data.mkdir()
    libc.mount("small", str(agent.data), "tmpfs", mounts.MS_NOSUID, f"mode=0711,size={_BYTES}")
    try:
        agent.start()
        agent.import_busybox(busybox)
        yield agent
    finally:
        agent.kill()
        (agent.data / "filling").unlink(missing_ok=True)
        agent.reset()


def _fill(agent: AgentProcess) -> None:
    with contextlib.suppress(OSError), (agent.data / "filling").open("ab", buffering=0) as file:
        while file.write(bytes(4096)) == 4096:
            pass


def _listed(agent: AgentProcess) -> list[str]:
    containers = agent.client.call("ListContainers", cri_pb2.ListContainersRequest()).containers
    return [container.id for container in containers]


def test_what_a_full_disk_keeps_from_being_removed_is_listed(small: AgentProcess) -> None:
    client = small.client
    config = sandbox_config(small)
    sandbox_id = client.run_sandbox(config)
    made = [client.create(sandbox_id, container_config(f"c{n}", "sleep", "1000"), config) for n in range(12)]
    refused = []
    for container_id in made:
        _fill(small)
        try:
            client.remove(container_id)
            assert container_id not in _listed(small)
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, error.details()
            assert container_id in _listed(small)
            refused.append(container_id)
    assert refused, "the disk was never full"
    (small.data / "filling").unlink()
    for container_id in refused:
        client.remove(container_id)
    assert _listed(small) == []
    client.stop_sandbox(sandbox_id)
    client.remove_sandbox(sandbox_id)
    assert client.findings() == []


def test_a_copy_of_the_store_that_a_full_disk_keeps_from_being_adopted_stays_whole(small: AgentProcess) -> None:
    _, container_id = run_container(small, "sleep", "1000")
    small.stop()
    for file in small.data.glob("podkeel.db*"):
        file.unlink()
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
    (small.data / "filling").unlink()
    adopting = subprocess.Popen(small.command("serve", "--adopt", *small.flags), stderr=subprocess.DEVNULL)
    try:
        small.connect()
        assert small.client.status(container_id).state == cri_pb2.CONTAINER_RUNNING
        assert small.client.findings() == []
    finally:
        adopting.terminate()
        adopting.wait(timeout=30)
