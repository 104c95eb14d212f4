"""A node without CRIU: everything works but checkpoints, which are refused with the reason."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess, running_agent
from tests.support.checkpoints import abilities, checkpoint, checkpoint_pod, nothing_is_left, restore_pod
from tests.support.pods import POLITE, container_config, run_container

OPTIONS = '\n[checkpoint]\ncriu_path = "/missing/criu"'


@pytest.fixture(scope="module")
def unable(tmp_path_factory: pytest.TempPathFactory, busybox: Path) -> Iterator[AgentProcess]:
    with running_agent(tmp_path_factory.mktemp("unable"), busybox, options=OPTIONS) as agent:
        yield agent


def test_checkpoints_are_refused_with_the_reason(unable: AgentProcess, tmp_path: Path) -> None:
    _, container_id = run_container(unable, *POLITE)
    with pytest.raises(grpc.RpcError) as failure:
        checkpoint(unable, container_id, tmp_path / "it.tar")
    assert failure.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "CRIU is not installed (/missing/criu, checkpoint.criu_path)" in failure.value.details()
    assert unable.client.status(container_id).state == cri_pb2.CONTAINER_RUNNING
    nothing_is_left(unable, tmp_path)
    command = unable.command("checkpoint", "--socket", unable.address, container_id, str(tmp_path / "it.tar"))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "CRIU is not installed" in done.stderr
    nothing_is_left(unable, tmp_path)


def test_status_and_check_say_so(unable: AgentProcess) -> None:
    assert all("CRIU is not installed" in why for why in abilities(unable).values())
    done = subprocess.run(
        unable.command("check", "--format", "json", *unable.flags), capture_output=True, text=True, check=False
    )
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["checkpoints"]["state"] == "ok"
    assert "CRIU is not installed" in checks["checkpoints"]["detail"]


def test_pods_are_refused_with_the_reason(unable: AgentProcess, tmp_path: Path) -> None:
    config = container_config("main", *POLITE)
    sandbox_id, container_id = run_container(unable, *POLITE)
    for call in (
        lambda: checkpoint_pod(unable, sandbox_id, tmp_path, [container_id]),
        lambda: restore_pod(unable, tmp_path, config, handler=""),
    ):
        with pytest.raises(grpc.RpcError) as failure:
            call()
        assert failure.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "CRIU is not installed (/missing/criu, checkpoint.criu_path)" in failure.value.details()
    nothing_is_left(unable, tmp_path)
