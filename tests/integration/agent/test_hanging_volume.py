"""Volumes on a file system whose server does not answer."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from host import libc, mounts
from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess
from tests.support.pods import container_config, run_container, sandbox_config

# More than the agent has threads for short work.
_CONTAINERS = 16


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[Path]:
    """A folder that hangs whoever looks at it, until the test is over: a FUSE file system that nobody serves."""
    folder = tmp_path / "silent"
    folder.mkdir()
    try:
        server = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        pytest.skip("this kernel has no FUSE")
    try:
        libc.mount("silent", str(folder), "fuse", 0, f"fd={server},rootmode=40000,user_id=0,group_id=0")
        yield folder
    finally:
        os.close(server)  # who hangs there gets an error now
        mounts.unmount(folder, lazy=True)


def test_containers_that_wait_for_their_volumes_keep_no_others_waiting(agent: AgentProcess, silent: Path) -> None:
    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox)
    waiting = []
    for number in range(_CONTAINERS):
        config = container_config(f"c{number}", "sleep", "1000")
        config.mounts.add(container_path="/data", host_path=str(silent))
        request = cri_pb2.CreateContainerRequest(pod_sandbox_id=sandbox_id, config=config, sandbox_config=sandbox)
        waiting.append(agent.client.future("CreateContainer", request))
    time.sleep(2)  # by then they hang, which nothing tells
    _, container_id = run_container(agent, "sleep", "1000")
    assert agent.client.exec(container_id, "echo", "works").stdout == b"works\n"
    agent.client.stop(container_id)
    assert not any(future.done() for future in waiting)
    for future in waiting:
        future.cancel()
