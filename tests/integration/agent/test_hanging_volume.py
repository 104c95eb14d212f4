"""Volumes on a file system whose server does not answer."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from host import libc
from host.files import mounts
from proto.runtime.v1 import cri_pb2
from tests.support.agent import SOON, AgentProcess, running_agent, wait_for
from tests.support.pods import container_config, run_container, sandbox_config
from tests.support.ports import free_port

# More than the agent has threads for short work.
_CONTAINERS = 16


class Silent:
    """A folder on which every access hangs, until ``end``: a FUSE file system without a server."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(exist_ok=True)
        self._server = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        libc.mount("silent", str(path), "fuse", 0, f"fd={self._server},rootmode=40000,user_id=0,group_id=0")

    def end(self) -> None:
        """Who hangs there gets an error now. Repeatable."""
        if self._server >= 0:
            os.close(self._server)
            self._server = -1
            mounts.unmount(self.path, lazy=True)


class Mute(Silent):
    """The same with a server that takes requests and never answers: who waits for it cannot even be killed."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        length, _, unique = struct.unpack_from("=IIQ", os.read(self._server, 1 << 20))
        assert length >= 56
        # fuse_out_header, and fuse_init_out: version 7.31, no more than that.
        body = struct.pack("=IIIIHHIIHHI28x", 7, 31, 65536, 0, 12, 9, 65536, 1, 1, 0, 0)
        os.write(self._server, struct.pack("=IiQ", 16 + len(body), 0, unique) + body)
        self.taken = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        poller = select.poll()
        poller.register(self._server, select.POLLIN)
        with contextlib.suppress(OSError):
            while self._server >= 0:
                if poller.poll(100):
                    os.read(self._server, 1 << 20)
                    self.taken += 1


@pytest.fixture
def mute(tmp_path: Path) -> Iterator[Mute]:
    if not Path("/dev/fuse").exists():
        pytest.skip("this kernel has no FUSE")
    folder = Mute(tmp_path / "mute")
    yield folder
    folder.end()


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[Silent]:
    if not Path("/dev/fuse").exists():
        pytest.skip("this kernel has no FUSE")
    folder = Silent(tmp_path / "silent")
    yield folder
    folder.end()


def waiting_creation(agent: AgentProcess, silent: Silent, sandbox_id: str, sandbox: cri_pb2.PodSandboxConfig) -> Any:
    """A CreateContainer that hangs on its volume."""
    config = container_config("hangs", "sleep", "1000")
    config.mounts.add(container_path="/data", host_path=str(silent.path))
    request = cri_pb2.CreateContainerRequest(pod_sandbox_id=sandbox_id, config=config, sandbox_config=sandbox)
    before = threads(agent)
    future = agent.client.future("CreateContainer", request)
    wait_for(lambda: threads(agent) - before, what="a thread that hangs")
    return future


def threads(agent: AgentProcess) -> set[str]:
    """The agent's threads that wait for an answer of the file system without a server."""
    return {task.name for task in Path(f"/proc/{agent.pid()}/task").iterdir() if b"fuse" in stack_of(task)}


def stack_of(task: Path) -> bytes:
    try:
        return (task / "stack").read_bytes()
    except OSError:
        return b""


def test_a_pod_is_given_up_while_its_container_hangs(agent: AgentProcess, silent: Silent) -> None:
    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox)
    future = waiting_creation(agent, silent, sandbox_id, sandbox)
    begin = time.monotonic()
    agent.client.stop_sandbox(sandbox_id)
    agent.client.remove_sandbox(sandbox_id)
    assert time.monotonic() - begin < SOON  # a call that waits for the volume would never end
    with pytest.raises(grpc.RpcError) as caught:
        future.result()
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert list((agent.run / "containers").iterdir()) == []
    assert agent.client.findings() == []
    wait_for(lambda: "thread abandoned: a volume does not answer" in agent.log.read_text())


def test_a_container_that_was_given_up_changes_nothing_when_its_volume_answers(
    agent: AgentProcess, silent: Silent
) -> None:
    """kubelet's deadline ends the call; a container of the same name may then be made at once."""
    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox)
    future = waiting_creation(agent, silent, sandbox_id, sandbox)
    future.cancel()
    container_id = agent.client.create(sandbox_id, container_config("hangs", "sleep", "1000"), sandbox)
    agent.client.start(container_id)
    silent.end()
    wait_for(lambda: not threads(agent), what="the end of the thread")
    assert [path.name for path in (agent.run / "containers").iterdir()] == [container_id]
    assert agent.client.findings() == []


def test_an_agent_stops_while_a_container_hangs(own_agent: AgentProcess, silent: Silent) -> None:
    sandbox = sandbox_config(own_agent)
    sandbox_id = own_agent.client.run_sandbox(sandbox)
    waiting_creation(own_agent, silent, sandbox_id, sandbox)
    own_agent.stop()
    own_agent.start()
    own_agent.client.remove_sandbox(sandbox_id)


@pytest.mark.skipif(
    tuple(map(int, os.uname().release.split(".")[:2])) < (6, 9), reason="this kernel has no descriptors of threads"
)
def test_the_next_agent_starts_while_the_killed_one_hangs(tmp_path: Path, busybox: Path, mute: Mute) -> None:
    port = free_port()
    with running_agent(tmp_path, busybox, options=f'[metrics]\naddress = "127.0.0.1:{port}"') as agent:
        sandbox = sandbox_config(agent)
        sandbox_id = agent.client.run_sandbox(sandbox)
        _, running = run_container(agent, "sleep", "1000")
        waiting = waiting_creation(agent, mute, sandbox_id, sandbox)
        wait_for(lambda: mute.taken > 0)  # one that is not taken yet ends with its caller
        killed = agent.process
        assert killed is not None
        killed.send_signal(signal.SIGKILL)
        wait_for(lambda: Path(f"/proc/{killed.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
        with pytest.raises(subprocess.TimeoutExpired):
            killed.wait(0.5)
        agent.launch()
        with pytest.raises(grpc.RpcError) as caught:
            waiting.result(timeout=SOON)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE  # and not only at its deadline
        agent.connect()
        assert agent.client.exec(running, "true").exit_code == 0
        assert "was killed and hangs: taken over" in agent.log.read_text()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=SOON) as answer:
            assert answer.status == 200
        agent.client.remove_sandbox(sandbox_id)
        assert agent.client.findings() == []
        mute.end()
        killed.wait(SOON)


def test_containers_that_wait_for_their_volumes_keep_no_others_waiting(agent: AgentProcess, silent: Silent) -> None:
    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox)
    waiting, before = [], threads(agent)
    for number in range(_CONTAINERS):
        config = container_config(f"c{number}", "sleep", "1000")
        config.mounts.add(container_path="/data", host_path=str(silent.path))
        request = cri_pb2.CreateContainerRequest(pod_sandbox_id=sandbox_id, config=config, sandbox_config=sandbox)
        waiting.append(agent.client.future("CreateContainer", request))
    wait_for(lambda: len(threads(agent) - before) == _CONTAINERS, what="threads that hang")
    _, container_id = run_container(agent, "sleep", "1000")
    assert agent.client.exec(container_id, "echo", "works").stdout == b"works\n"
    agent.client.stop(container_id)
    assert not any(future.done() for future in waiting)
    for future in waiting:
        future.cancel()


def test_a_log_folder_that_does_not_answer_delays_no_other_container(agent: AgentProcess, silent: Silent) -> None:
    sandbox = sandbox_config(agent)
    sandbox.log_directory = str(silent.path / "pod")
    sandbox_id = agent.client.run_sandbox(sandbox)
    before = threads(agent)
    config = container_config("hangs", "sleep", "1000")
    request = cri_pb2.CreateContainerRequest(pod_sandbox_id=sandbox_id, config=config, sandbox_config=sandbox)
    future = agent.client.future("CreateContainer", request)
    wait_for(lambda: threads(agent) - before, what="a thread that hangs")
    begin = time.monotonic()
    agent.client.call("Version", cri_pb2.VersionRequest(), timeout=SOON)
    _, other = run_container(agent, "sleep", "1000", name="other")
    assert agent.client.exec(other, "true").exit_code == 0
    agent.client.remove_sandbox(sandbox_id)
    assert time.monotonic() - begin < SOON
    with pytest.raises(grpc.RpcError):
        future.result()
    assert agent.client.findings() == []
