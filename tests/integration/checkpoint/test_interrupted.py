"""An agent that is killed in the middle of a checkpoint: its next start leaves the container running, and no files."""

from __future__ import annotations

import threading
from pathlib import Path

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.checkpoint.test_container import LARGE, LARGE_BYTES
from tests.support.agent import AgentProcess, wait_for
from tests.support.checkpoints import (
    COUNTER,
    abilities,
    checkpoint,
    memory_of,
    nothing_is_left,
    run_with,
    wait_for_lines,
)

STAGES = ("reserve:after", "freeze:after", "dump:after", "files:after", "archive:after")


@pytest.fixture
def killed(own_agent: AgentProcess, able: dict[str, str]) -> AgentProcess:
    """An agent of the test's own, where crun can make checkpoints."""
    if able.get("crun") != "able":
        pytest.skip(f"crun cannot make checkpoints here: {able.get('crun')}")
    assert abilities(own_agent)["crun"] == "able"
    return own_agent


def test_killed_at_every_stage(killed: AgentProcess, tmp_path: Path) -> None:
    _, container_id = run_with(killed, "crun", *COUNTER)
    place, faults = tmp_path / "place", tmp_path / "faults"
    place.mkdir()
    faults.write_text("")
    killed.restart(f"@{faults}")
    for stage in STAGES:
        faults.write_text(f"CheckpointContainer.{stage}:kill")
        with pytest.raises(grpc.RpcError):
            checkpoint(killed, container_id, place / "it.tar")
        killed.wait_dead()
        killed.start(f"@{faults}")
        assert killed.client.status(container_id).state == cri_pb2.CONTAINER_RUNNING, stage
        wait_for_lines(killed, container_id, 3)
        nothing_is_left(killed, place)
    faults.write_text("")
    checkpoint(killed, container_id, place / "it.tar")
    wait_for_lines(killed, container_id, 3)


def test_killed_while_criu_works(killed: AgentProcess, tmp_path: Path) -> None:
    _, container_id = run_with(killed, "crun", *LARGE)
    wait_for(lambda: memory_of(killed, container_id) > LARGE_BYTES, what="its memory", seconds=30)
    place = tmp_path / "place"
    place.mkdir()

    def call() -> None:
        with pytest.raises(grpc.RpcError):
            checkpoint(killed, container_id, place / "it.tar")

    thread = threading.Thread(target=call)
    thread.start()
    work = killed.data / "checkpoints" / container_id / "checkpoint"
    wait_for(lambda: any(work.glob("pages-*.img")), what="pages")
    killed.kill()
    thread.join()
    killed.start()
    wait_for_lines(killed, container_id, 5)
    assert memory_of(killed, container_id) > LARGE_BYTES
    nothing_is_left(killed, place)
    checkpoint(killed, container_id, place / "it.tar")


def test_a_failure_at_every_stage(killed: AgentProcess, tmp_path: Path) -> None:
    _, container_id = run_with(killed, "crun", *COUNTER)
    place, faults = tmp_path / "place", tmp_path / "faults"
    place.mkdir()
    faults.write_text("")
    killed.restart(f"@{faults}")
    for stage in STAGES:
        faults.write_text(f"CheckpointContainer.{stage}:error")
        with pytest.raises(grpc.RpcError) as failure:
            checkpoint(killed, container_id, place / "it.tar")
        assert "fault planted" in failure.value.details()
        wait_for_lines(killed, container_id, 3)
        nothing_is_left(killed, place)
