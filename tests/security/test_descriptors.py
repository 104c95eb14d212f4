"""With few file descriptors left, the agent refuses streams, commands and images. Stops, pods and new clients work."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.agent.refusals import refused
from tests.support.agent import BUSYBOX, PATIENCE, AgentProcess, wait_for
from tests.support.cri import CriClient
from tests.support.pods import run_container, sandbox_config

LIMIT = 320


class FewDescriptors(AgentProcess):
    """An agent with a low limit of file descriptors."""

    def command(self, *words: str) -> list[str]:
        limit = ["prlimit", f"--nofile={LIMIT}:{LIMIT}"] if words[0] == "serve" else []
        return [*limit, *super().command(*words)]


@pytest.fixture
def few(tmp_path: Path, busybox: Path) -> Iterator[AgentProcess]:
    agent = FewDescriptors(tmp_path)
    try:
        agent.start()
        agent.import_busybox(busybox)
        yield agent
    finally:
        agent.reset()


def opened(agent: AgentProcess) -> int:
    return len(list(Path(f"/proc/{agent.pid()}/fd").iterdir()))


def test_commands_that_use_all_descriptors_do_not_prevent_stops_and_starts(few: AgentProcess) -> None:
    _, victim = run_container(few, "sleep", "1000", name="victim")
    _, busy = run_container(few, "sleep", "1000", name="busy")
    request = cri_pb2.ExecSyncRequest(container_id=busy, cmd=["sleep", "1000"])
    commands: list[Any] = []
    deadline = time.monotonic() + 60 * PATIENCE
    while not any(command.done() for command in commands):
        assert time.monotonic() < deadline, f"{opened(few)} descriptors and no command was refused"
        commands.append(few.client.future("ExecSync", request, timeout=600))
        time.sleep(0.02)
    in_a_row = 0
    while in_a_row < 10:  # a command uses more descriptors while it starts than later
        commands.append(few.client.future("ExecSync", request, timeout=600))
        with contextlib.suppress(grpc.FutureTimeoutError):
            in_a_row = in_a_row + 1 if commands[-1].exception(timeout=0.5 * PATIENCE) is not None else 0
            continue
        in_a_row = 0
    ended = next(command for command in commands if command.done())
    assert ended.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "file descriptors are left" in ended.details()
    wait_for(lambda: sum(not command.done() for command in commands) > 5, what="commands that run")
    size = few.log.stat().st_size
    for _ in range(300):  # as a client that keeps retrying
        refused("RESOURCE_EXHAUSTED", "LimitNOFILE", call=partial(few.client.call, "ExecSync", request))
    image = cri_pb2.ImageSpec(image=BUSYBOX)
    for method, message in (
        ("Exec", cri_pb2.ExecRequest(container_id=busy, cmd=["sh"], stdin=True)),
        ("PortForward", cri_pb2.PortForwardRequest(pod_sandbox_id=few.client.status(busy).id, port=[1])),
        ("PullImage", cri_pb2.PullImageRequest(image=image)),
    ):
        for _ in range(50):
            call = partial(few.client.call, method, message)
            refused("RESOURCE_EXHAUSTED", "file descriptors are left", call=call)
    assert few.log.stat().st_size - size < 20_000
    assert opened(few) < LIMIT - 30
    # Other processes keep running.
    few.client.stop(victim)
    sandbox = few.client.run_sandbox(sandbox_config(few))
    few.client.stop_sandbox(sandbox)
    newcomer = CriClient(few.address)
    try:
        newcomer.call("Version", cri_pb2.VersionRequest(), timeout=10)
        newcomer.call("ListContainers", cri_pb2.ListContainersRequest(), timeout=10)
    finally:
        newcomer.close()
    few.client.stop(busy)
    wait_for(lambda: all(command.done() for command in commands), what="the end of the commands")
    assert few.client.exec(run_container(few, "sleep", "1000", name="after")[1], "true").exit_code == 0
    assert "Traceback" not in few.log.read_text()
