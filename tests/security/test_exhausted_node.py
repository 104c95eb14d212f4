"""Without free descriptors, process ids or namespaces, no end of a container is lost, and everything can be removed."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from host import cgroups, libc
from host.errors import NodeLimitError
from images.unpack import unpacker as unpacking
from images.unpack.unpacker import Unpacker
from proto.runtime.v1 import cri_pb2
from tests.integration.agent.hardening import init_pid
from tests.integration.agent.refusals import refused
from tests.security.conftest import pod_config
from tests.security.worker_attack import ANY, layer, quiet, unpacker
from tests.support.agent import AgentProcess, wait_for
from tests.support.pods import remove_all_pods, run_container, sandbox_config

__all__ = ["layer", "unpacker"]


def states(agent: AgentProcess) -> dict[str, int]:
    listed = agent.client.call("ListContainers", cri_pb2.ListContainersRequest()).containers
    return {container.id: container.state for container in listed}


@contextlib.contextmanager
def no_descriptor(agent: AgentProcess) -> Iterator[None]:
    """The agent can open no file, as if another process used all descriptors of the node."""
    limits = resource.prlimit(agent.pid(), resource.RLIMIT_NOFILE)
    resource.prlimit(agent.pid(), resource.RLIMIT_NOFILE, (8, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(agent.pid(), resource.RLIMIT_NOFILE, limits)


def test_an_end_without_a_free_descriptor_is_recorded_later(own_agent: AgentProcess) -> None:
    _, container_id = run_container(own_agent, "sleep", "1000")
    pid = init_pid(own_agent, container_id)
    before = own_agent.log.stat().st_size
    with no_descriptor(own_agent):
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: "Too many open files" in own_agent.log.read_text()[before:], what="the first attempt")
        assert states(own_agent) == {container_id: cri_pb2.CONTAINER_RUNNING}
    wait_for(lambda: states(own_agent) == {container_id: cri_pb2.CONTAINER_EXITED}, 30, "the end")
    assert own_agent.client.status(container_id).exit_code == 137
    assert own_agent.tracebacks(before) == []


@pytest.mark.parametrize("call", ["RemoveContainer", "StopPodSandbox"])
def test_a_container_whose_clean_up_failed_can_be_removed(own_agent: AgentProcess, call: str) -> None:
    sandbox_id, container_id = run_container(own_agent, "sleep", "1000")
    client, before = own_agent.client, own_agent.log.stat().st_size
    in_the_way = own_agent.run / "containers" / container_id / "mapped" / "0" / "file"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()
    client.stop(container_id)
    wait_for(lambda: "Directory not empty" in own_agent.log.read_text()[before:], what="the failure")
    in_the_way.unlink()
    if call == "RemoveContainer":
        client.remove(container_id)
    client.stop_sandbox(sandbox_id)
    client.remove_sandbox(sandbox_id)
    assert states(own_agent) == {}
    assert client.findings() == []
    assert own_agent.tracebacks(before) == []


@pytest.fixture
def few_processes(own_agent: AgentProcess) -> Iterator[Path]:
    """The file with the limit of processes and threads of the agent. Containers are not limited."""
    root = cgroups.discover().v1.get("pids")
    if root is None:
        pytest.skip("needs the pids controller of cgroup v1")
    folder = Path(root) / own_agent.bridge
    folder.mkdir()
    try:
        (folder / "cgroup.procs").write_text(str(own_agent.pid()))
        yield folder / "pids.max"
    finally:
        (folder / "pids.max").write_text("max")
        own_agent.reset()
        wait_for(lambda: not (folder / "cgroup.procs").read_text(), what="the agent's end")
        folder.rmdir()


def test_without_a_process_id_containers_end_and_can_be_removed(own_agent: AgentProcess, few_processes: Path) -> None:
    client, before = own_agent.client, own_agent.log.stat().st_size
    pods = [run_container(own_agent, "sleep", "1000", name=name) for name in ("first", "second")]
    (first, second) = (container_id for _, container_id in pods)
    pid = init_pid(own_agent, first)
    few_processes.write_text(few_processes.with_name("pids.current").read_text())
    refused("RESOURCE_EXHAUSTED", "can be started", call=lambda: exhaust(own_agent))
    os.kill(pid, signal.SIGKILL)
    client.stop(second)
    wait_for(lambda: set(states(own_agent).values()) == {cri_pb2.CONTAINER_EXITED}, what="the ends")
    few_processes.write_text("max")
    client.remove(first)
    remove_all_pods(client)
    assert states(own_agent) == {}
    assert client.findings() == []
    assert own_agent.tracebacks(before) == []


def exhaust(agent: AgentProcess) -> None:
    """Create pods until one is refused."""
    for _ in range(20):
        agent.client.run_sandbox(sandbox_config(agent))


# Simulates a kernel without free namespaces of these kinds, for a program and its children.
_FILTERED = """
import os, sys
from host import libc
from host.seccomp import ALLOW, ERRNO, MASKED_EQUAL, Comparison, Rule, compile_filter
kind, number = int(sys.argv[1]), int(sys.argv[2])
rule = Rule(("unshare",), ERRNO | number, (Comparison(0, MASKED_EQUAL, kind, kind),))
libc.install_seccomp_filter(compile_filter(ALLOW, [rule]))
os.execvp(sys.argv[3], sys.argv[3:])
"""
_CLONE_NEWUSER = 0x10000000


class NoNamespaces(AgentProcess):
    """An agent that cannot make namespaces of ``kind``, if that is set."""

    kind = 0

    def command(self, *words: str) -> list[str]:
        command = super().command(*words)
        if words[0] != "serve" or not self.kind:
            return command
        return [sys.executable, "-c", _FILTERED, str(self.kind), str(errno.ENOSPC), *command]


@pytest.mark.parametrize(
    ("kind", "user_namespace"), [(libc.CLONE_NEWNET, False), (_CLONE_NEWUSER, True)], ids=["network", "user"]
)
def test_without_a_namespace_pods_are_refused_and_others_can_end(
    tmp_path: Path, busybox: Path, kind: int, user_namespace: bool
) -> None:
    agent = NoNamespaces(tmp_path)
    try:
        agent.start()
        agent.import_busybox(busybox)
        sandbox_id, container_id = run_container(agent, "sleep", "1000")
        agent.kind = kind
        agent.restart()
        wanted = pod_config(agent, user_namespace=user_namespace)
        refused("RESOURCE_EXHAUSTED", "/proc/sys/user", call=lambda: agent.client.run_sandbox(wanted))
        assert agent.client.exec(container_id, "true").exit_code == 0
        agent.client.remove(container_id)
        agent.client.stop_sandbox(sandbox_id)
        agent.client.remove_sandbox(sandbox_id)
        assert agent.client.findings() == []
        assert agent.tracebacks() == []
    finally:
        agent.kind = 0
        agent.reset()


@pytest.mark.parametrize(
    ("refused_call", "words"),
    [
        (("unshare", libc.CLONE_NEWPID, errno.ENOSPC), "/proc/sys/user"),
        (("unshare", libc.CLONE_NEWNET, errno.ENOSPC), "/proc/sys/user"),
        (("clone", 0, errno.EAGAIN), "kernel.pid_max"),
    ],
    ids=["PID namespaces", "network namespaces", "processes"],
)
async def test_a_layer_is_refused_if_no_worker_can_be_started(
    unpacker: Unpacker,
    layer: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused_call: tuple[str, int, int],
    words: str,
) -> None:
    name, kind, number = refused_call
    refuse = (
        "from host import libc; from host.seccomp import ALLOW, ERRNO, MASKED_EQUAL, Comparison, Rule, compile_filter; "
        f"rule = Rule(({name!r},), ERRNO | {number}, (Comparison(0, MASKED_EQUAL, {kind}, {kind}),)); "
        "libc.install_seccomp_filter(compile_filter(ALLOW, [rule])); "
    )
    begin, imported, end = unpacking.START.partition("from images.unpack.worker")
    monkeypatch.setattr(unpacking, "START", begin + refuse + imported + end)
    with pytest.raises(NodeLimitError) as caught:
        await unpacker.unpack(quiet(), ANY, layer, None, "a layer")
    assert caught.value.message.startswith("a layer could not be unpacked: the node has no more ")
    assert words in caught.value.message
    assert list(layer.iterdir()) == []
