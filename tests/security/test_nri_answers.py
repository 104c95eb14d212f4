"""Wrong, very large and very many answers of NRI plugins fail only the operations that they belong to."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from proto.nri.v1alpha1 import nri_pb2
from proto.runtime.v1 import cri_pb2
from proto.ttrpc.v1 import ttrpc_pb2
from tests.support.agent import AgentProcess, running_agent, wait_for
from tests.support.nri import Recorder, connected
from tests.support.pods import container_config, run_container, sandbox_config

Adjustment = nri_pb2.ContainerAdjustment
Linux = nri_pb2.LinuxContainerAdjustment
MANY = 20_000


@pytest.fixture(scope="module")
def shared_agent(tmp_path_factory: pytest.TempPathFactory, busybox: Path) -> Iterator[AgentProcess]:
    with running_agent(tmp_path_factory.mktemp("nri-answers"), busybox) as made:
        yield made


def linux(**fields: Any) -> Adjustment:
    return Adjustment(linux=Linux(**fields))


def refused(agent: AgentProcess, adjust: Adjustment) -> grpc.RpcError:
    """The error of CreateContainer for a plugin's answer. Nothing of the container may stay."""
    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox)
    acting = {"CreateContainer": lambda _: nri_pb2.CreateContainerResponse(adjust=adjust)}
    create = cri_pb2.CreateContainerRequest(
        pod_sandbox_id=sandbox_id, config=container_config("main", "sleep", "1000"), sandbox_config=sandbox
    )
    with connected(Recorder(agent.nri_socket, acting=acting)), pytest.raises(grpc.RpcError) as raised:
        agent.client.call("CreateContainer", create, 20)
    assert not agent.client.call("ListContainers", cri_pb2.ListContainersRequest()).containers
    return raised.value


LARGE = {
    "mounts": Adjustment(mounts=[nri_pb2.Mount(destination=f"/m{n}", type="tmpfs") for n in range(MANY)]),
    "args": Adjustment(args=["sleep"] * MANY),
    "devices": linux(devices=[nri_pb2.LinuxDevice(path=f"/dev/x{n}", type="c", major=1) for n in range(MANY)]),
    "rlimits": Adjustment(rlimits=[nri_pb2.POSIXRlimit(type=f"RLIMIT_{n}") for n in range(MANY)]),
    "hugepage_limits": linux(
        resources=nri_pb2.LinuxResources(
            hugepage_limits=[nri_pb2.HugepageLimit(page_size=f"{n}MB") for n in range(1, MANY)]
        )
    ),
    "bytes of changes": Adjustment(annotations={"long": "x" * (1 << 20)}),
}


@pytest.mark.parametrize("what", LARGE)
def test_an_answer_that_is_too_large_fails_its_container_soon(agent: AgentProcess, what: str) -> None:
    error = refused(agent, LARGE[what])
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "NRI plugin 10-recorder answers " in error.details()
    assert what in error.details()
    assert "the limit is" in error.details()


@pytest.mark.parametrize(
    ("field", "adjust"),
    [
        ("args", Adjustment(args=["sleep\0", "1000"])),
        ("annotations", Adjustment(annotations={"a": "b\0"})),
        ("type", Adjustment(mounts=[nri_pb2.Mount(destination="/x", type="tm\0pfs")])),
        ("options", Adjustment(mounts=[nri_pb2.Mount(destination="/x", type="tmpfs", options=["r\0o"])])),
        ("args", Adjustment(hooks=nri_pb2.Hooks(poststop=[nri_pb2.Hook(path="/bin/true", args=["a\0"])]))),
    ],
    ids=["args", "annotations", "mount-type", "mount-options", "hook-args"],
)
def test_text_with_nul_bytes_is_refused(agent: AgentProcess, field: str, adjust: Adjustment) -> None:
    error = refused(agent, adjust)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"NRI plugin 10-recorder answers a NUL byte in {field}: " in error.details()


@pytest.mark.parametrize("what", ["pipe", "file", "missing", "another kind"])
def test_a_path_that_is_no_namespace_is_refused_without_waiting(agent: AgentProcess, tmp_path: Path, what: str) -> None:
    path = "/proc/self/ns/uts" if what == "another kind" else str(tmp_path / "namespace")
    if what == "pipe":
        os.mkfifo(path)
    elif what == "file":
        Path(path).touch()
    error = refused(agent, linux(namespaces=[nri_pb2.LinuxNamespace(type="ipc", path=path)]))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "NRI plugin 10-recorder: Namespace ipc: " in error.details()


def test_a_system_call_has_six_arguments(agent: AgentProcess) -> None:
    argument = nri_pb2.LinuxSeccompArg(index=6, op="SCMP_CMP_EQ")
    call = nri_pb2.LinuxSyscall(names=["read"], action="SCMP_ACT_ERRNO", args=[argument])
    policy = nri_pb2.LinuxSeccomp(default_action="SCMP_ACT_ALLOW", syscalls=[call])
    assert "10-recorder: SeccompPolicy: a system call" in refused(agent, linux(seccomp_policy=policy)).details()


def test_a_plugin_s_error_is_one_short_line_of_the_log(agent: AgentProcess) -> None:
    def refuse(_request: Any) -> None:
        raise RuntimeError("no\n2026-01-01 info server: agent: stopped\x1b[2J" + "e" * (3 << 20))

    size = agent.log.stat().st_size
    with (
        connected(Recorder(agent.nri_socket, acting={"RunPodSandbox": refuse})),
        pytest.raises(grpc.RpcError) as raised,
    ):
        agent.client.run_sandbox(sandbox_config(agent))
    assert r"RunPodSandbox: no\n2026-01-01 info server: agent: stopped\x1b[2J" in raised.value.details()
    assert len(raised.value.details()) < 2000
    assert agent.log.stat().st_size - size < 10_000


def test_the_reason_of_an_eviction_is_one_short_line_of_the_status(agent: AgentProcess) -> None:
    _, container_id = run_container(agent, "sleep", "1000")
    eviction = nri_pb2.ContainerEviction(container_id=container_id, reason="full\n\x1b[2J" + "e" * 10_000)
    with connected(Recorder(agent.nri_socket)) as plugin:
        plugin.update_containers(nri_pb2.UpdateContainersRequest(evict=[eviction]))
    status = agent.client.status(container_id)
    assert status.reason == "Evicted"
    assert status.message.startswith(r"evicted by NRI plugin 10-recorder: full\n\x1b[2Je")
    assert len(status.message) < 400


class Raw:
    """A plugin that sends the messages of a test."""

    def __init__(self, agent: AgentProcess) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(str(agent.nri_socket))

    def send(self, connection: int, stream: int, kind: int, body: bytes, times: int = 1) -> None:
        message = struct.pack(">IIBB", len(body), stream, kind, 0) + body
        self.socket.sendall((struct.pack(">II", connection, len(message)) + message) * times)


@pytest.mark.parametrize("kind", [2, 3, 77])
def test_a_flood_of_messages_that_are_no_requests_ends_the_connection(agent: AgentProcess, kind: int) -> None:
    plugin, size = Raw(agent), agent.log.stat().st_size
    with plugin.socket, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for _ in range(10):
            plugin.send(2, 1, kind, b"x", 1000)
        assert plugin.socket.recv(1) == b""
    wait_for(lambda: b"not admitted" in agent.log.read_bytes()[size:], what="the reason")
    assert b"did not register within" not in agent.log.read_bytes()[size:]


def test_a_plugin_that_hangs_in_synchronize_again_and_again_delays_pods_once(agent: AgentProcess) -> None:
    release, hung = threading.Event(), threading.Semaphore(0)

    def hang(_request: Any) -> None:
        hung.release()
        release.wait(20)

    def reconnect() -> None:
        while not release.is_set():
            plugin = Recorder(agent.nri_socket, name="hangs", acting={"Synchronize": hang})
            try:
                plugin.run()
            except (OSError, RuntimeError):
                time.sleep(0.1)

    comers = [threading.Thread(target=reconnect, daemon=True) for _ in range(2)]
    try:
        for comer in comers:
            comer.start()
        assert hung.acquire(timeout=10)
        run_container(agent, "sleep", "1000")  # waits for the first plugin, and perhaps for the second
        wait_for(lambda: "it may connect again in" in agent.log.read_text(), 15)
        begin = time.monotonic()
        run_container(agent, "sleep", "1000")
        assert time.monotonic() - begin < 4
    finally:
        release.set()
        for comer in comers:
            comer.join(10)
    with connected(Recorder(agent.nri_socket, name="works")) as other:
        assert len(other.containers) == 2


def resident(agent: AgentProcess) -> int:
    """The memory usage of the agent in bytes."""
    return int(Path(f"/proc/{agent.pid()}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def registered(agent: AgentProcess, number: int) -> Raw:
    """A registered plugin, which may send messages of 4 MiB and never answers."""
    plugin = Raw(agent)
    name = nri_pb2.RegisterPluginRequest(plugin_name=f"half{number}", plugin_idx="50")
    call = ttrpc_pb2.Request(
        service="nri.pkg.api.v1alpha1.Runtime", method="RegisterPlugin", payload=name.SerializeToString()
    )
    plugin.send(2, 1, 1, call.SerializeToString())
    assert plugin.socket.recv(8)  # the answer, or Configure
    return plugin


def test_incomplete_messages_of_all_plugins_share_one_limit(agent: AgentProcess) -> None:
    before, held = resident(agent), []
    half = struct.pack(">II", 2, 10 + (4 << 20)) + struct.pack(">IIBB", 4 << 20, 3, 1, 0) + bytes(4 << 20)
    with contextlib.ExitStack() as stack:
        for number in range(24):
            plugin = registered(agent, number)
            stack.enter_context(plugin.socket)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                plugin.socket.sendall(half[:-1])
            held.append(plugin)
        wait_for(lambda: "of messages that are incomplete or not answered yet" in agent.log.read_text())
        assert resident(agent) - before < 90 << 20
        run_container(agent, "sleep", "1000")


@pytest.mark.parametrize("number", [1, 2, 15])
def test_a_message_of_millions_of_parts_is_refused_before_it_is_parsed(agent: AgentProcess, number: int) -> None:
    before = resident(agent)
    body = ttrpc_pb2.Request(
        service="nri.pkg.api.v1alpha1.Runtime",
        method="UpdateContainers",
        payload=bytes((number << 3 | 2, 0)) * (1 << 20),
    ).SerializeToString()
    with connected(Recorder(agent.nri_socket)) as plugin:
        answers = [plugin.raw_call(body) for _ in range(3)]
    assert all("the limit is" in answer.status.message for answer in answers)
    assert resident(agent) - before < 60 << 20
