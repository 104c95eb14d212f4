"""Starts with folders that another agent uses, that a newer version wrote, or that are partly or completely lost."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from host.files import mounts
from host.files.procfs import all_pids, command_line, read_bounded
from proto.runtime.v1 import cri_pb2
from runtime.state.container import ContainerRecord
from runtime.state.sandbox import SandboxRecord
from tests.faults.conftest import FaultyAgent
from tests.faults.node_state import assert_whole
from tests.support.agent import AgentProcess, wait_for
from tests.support.pods import container_config, log_lines, run_container, sandbox_config


@pytest.fixture
def lone_agent(tmp_path: Path, busybox: Path) -> Iterator[FaultyAgent]:
    agent = FaultyAgent(tmp_path)
    try:
        agent.start()
        agent.import_busybox(busybox)
        yield agent
        assert_whole(agent)
    finally:
        agent.reset()


def _refusal(agent: AgentProcess) -> str:
    """The error of an agent that cannot start."""
    done = subprocess.run(agent.command("serve", *agent.flags), capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_second_agent_is_refused(lone_agent: FaultyAgent) -> None:
    refusal = _refusal(lone_agent)
    assert str(lone_agent.data) in refusal
    assert f"in use by another agent (pid {lone_agent.pid()}): stop it, or use other folders" in refusal
    lone_agent.client.call("Version", cri_pb2.VersionRequest())


def test_data_of_a_newer_version_is_refused(lone_agent: FaultyAgent) -> None:
    lone_agent.stop()
    with contextlib.closing(sqlite3.connect(lone_agent.data / "podkeel.db")) as store:
        versions = dict(store.execute("SELECT room, version FROM schema_versions"))
        for room, version in versions.items():
            store.execute("UPDATE schema_versions SET version = 99 WHERE room = ?", (room,))
            store.commit()
            refusal = _refusal(lone_agent)
            assert f"data folder {lone_agent.data} was written by a newer Podkeel ({room} tables" in refusal
            assert "start that version, or use another data folder" in refusal
            store.execute("UPDATE schema_versions SET version = ? WHERE room = ?", (version, room))
            store.commit()
    lone_agent.start()


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(lone_agent: FaultyAgent) -> None:
    path = lone_agent.run / "podkeel.sock"
    lone_agent.kill()
    assert path.is_socket()
    lone_agent.start()
    lone_agent.stop()
    assert not path.exists()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        assert f"socket {path} is served by another process" in _refusal(lone_agent)
    lone_agent.start()


def test_pods_keep_running_during_a_restart(lone_agent: FaultyAgent) -> None:
    count = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.02; done"
    sandbox_id, container_id = run_container(lone_agent, "sh", "-c", count)
    before = lone_agent.client.status(container_id)
    lone_agent.stop()
    lone_agent.start()
    assert lone_agent.client.status(container_id) == before
    assert lone_agent.client.sandbox_status(sandbox_id).state == cri_pb2.SANDBOX_READY
    seen = len(log_lines(before.log_path))
    wait_for(lambda: len(log_lines(before.log_path)) > seen)
    lines = log_lines(before.log_path)
    assert lines == [str(number) for number in range(len(lines))]


@pytest.mark.parametrize("rebooted", [False, True], ids=["same boot", "another boot"])
def test_a_lost_run_folder_is_a_reboot(lone_agent: FaultyAgent, rebooted: bool) -> None:
    client = lone_agent.client
    sandbox_id, running = run_container(lone_agent, "sleep", "1000")
    sandbox = sandbox_config(lone_agent)
    other_id = client.run_sandbox(sandbox)
    created = client.create(other_id, container_config("created", "sleep", "1000"), sandbox)
    refused = client.create(other_id, container_config("refused", "/absent"), sandbox)
    address = client.sandbox_status(sandbox_id).network.ip
    _end_all_and_empty_the_run_folder(lone_agent)
    if rebooted:
        _set_boot_ids(lone_agent.data / "podkeel.db", "another boot")
    lone_agent.start()
    client = lone_agent.client
    for lost in (sandbox_id, other_id):
        assert client.sandbox_status(lost).state == cri_pb2.SANDBOX_NOTREADY
    for lost in (running, created, refused):
        status = client.status(lost)
        assert (status.state, status.reason) == (cri_pb2.CONTAINER_EXITED, "Error")
        assert status.exit_code != 0
        assert status.message
        assert status.finished_at >= status.started_at > 0
    assert_whole(lone_agent)
    again, _ = run_container(lone_agent, "sleep", "1000")
    assert client.sandbox_status(again).network.ip != address
    client.remove(running)
    for lost in (sandbox_id, other_id):
        client.stop_sandbox(lost)
        client.remove_sandbox(lost)
    left = client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest()).items
    assert [item.id for item in left] == [again]


def _end_all_and_empty_the_run_folder(agent: AgentProcess) -> None:
    """End the agent and everything it made in the kernel, and empty the run folder, as a reboot does."""
    agent.kill()
    for pid in all_pids():
        monitored = f"{agent.run}/containers".encode() in b" ".join(command_line(pid))
        if monitored or agent.cgroup_parent.encode() in read_bounded(f"/proc/{pid}/cgroup", 65536):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    for target in mounts.mounts_below(agent.run):
        mounts.unmount(target, lazy=True)
    shutil.rmtree(agent.run)
    subprocess.run(["ip", "link", "delete", agent.bridge], check=True)
    for family in ("bridge", "inet"):
        subprocess.run(["nft", "delete", "table", family, agent.bridge], check=True)
    groups = [Path(entry.target) for entry in mounts.mount_table() if entry.filesystem in ("cgroup", "cgroup2")]
    for group in {root / agent.cgroup_parent.strip("/") for root in groups}:
        for below, _, _ in os.walk(group, topdown=False):
            wait_for(lambda below=below: _removed(Path(below)), what=f"removal of {below}")


def _removed(group: Path) -> bool:
    with contextlib.suppress(OSError):
        group.rmdir()
    return not group.exists()


def _set_boot_ids(path: Path, boot_id: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as store:
        kinds: dict[str, type[SandboxRecord | ContainerRecord]]
        kinds = {"sandboxes": SandboxRecord, "containers": ContainerRecord}
        for table, kind in kinds.items():
            for key, content in store.execute(f"SELECT id, record FROM {table}").fetchall():
                record = msgspec.msgpack.decode(content, type=kind)
                record.boot_id = boot_id
                store.execute(f"UPDATE {table} SET record = ? WHERE id = ?", (msgspec.msgpack.encode(record), key))
        store.commit()
