"""Rows of the store that can be read but are wrong do not make the agent touch objects of other programs."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest

from host.processes import start_time
from network.netlink import NETLINK_ROUTE
from network.netlink_socket import NetlinkSocket
from network.rtnetlink import delete_link
from proto.runtime.v1 import cri_pb2
from runtime.cgroups.tree import CgroupTree
from tests.support.agent import AgentProcess, wait_for
from tests.support.pods import container_config, run_container, sandbox_config, shared_pids


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process of the node in separate cgroups. A wrong row may name it although it is not the agent's."""
    cgroups = CgroupTree.of_host("cgroupfs")
    path = f"/podkeel-bystander-{os.getpid()}"
    process = subprocess.Popen(["sleep", "1000"])
    for folder in cgroups.folders(path):
        folder.mkdir()
        for name in ("cpuset.cpus", "cpuset.mems"):
            if (folder.parent / name).exists() and (folder / name).exists():
                (folder / name).write_text((folder.parent / name).read_text())
        (folder / "cgroup.procs").write_text(str(process.pid))
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        cgroups.remove(path)


@contextlib.contextmanager
def _store(agent: AgentProcess) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(agent.data / "podkeel.db", isolation_level=None)) as connection:
        yield connection


def _change(agent: AgentProcess, table: str, key: str, change: Callable[[dict[str, object]], None]) -> None:
    with _store(agent) as store:
        ((record,),) = store.execute(f"SELECT record FROM {table} WHERE id = ?", (key,)).fetchall()
        fields = msgspec.msgpack.decode(record)
        change(fields)
        store.execute(f"UPDATE {table} SET record = ? WHERE id = ?", (msgspec.msgpack.encode(fields), key))


def _alive(pid: int) -> bool:
    return start_time(pid) is not None


def _init_pid(agent: AgentProcess, container_id: str) -> int:
    return int((agent.run / "containers" / container_id / "init.pid").read_text())


def _name(pid: int) -> dict[str, int]:
    started = start_time(pid)
    assert started is not None
    return {"pid": pid, "started": started}


def _has_exited(agent: AgentProcess, container_id: str) -> bool:
    return agent.client.status(container_id).state == cri_pb2.CONTAINER_EXITED


def _end_all(agent: AgentProcess) -> None:
    for sandbox in agent.client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest()).items:
        agent.client.stop_sandbox(sandbox.id)
        agent.client.remove_sandbox(sandbox.id)


def test_no_other_process_is_ended_as_a_container_or_monitor(
    own_agent: AgentProcess, bystander: subprocess.Popen[bytes]
) -> None:
    other = _name(bystander.pid)
    lies: list[dict[str, object]] = [
        {"init": other},
        {"monitor": other},
        {"init": other, "monitor": other},
        {"init": None, "monitor": None},
    ]
    pods = [run_container(own_agent, "sleep", "1000") for _ in lies]
    ended = [run_container(own_agent, "true") for _ in range(2)]
    for _, container_id in ended:
        wait_for(partial(_has_exited, own_agent, container_id))
    own_agent.kill()
    for (_, container_id), lie in zip(pods, lies, strict=True):
        _change(own_agent, "containers", container_id, partial(dict.update, **lie))
    for (_, container_id), state in zip(ended, ("removing", "making"), strict=True):
        _change(own_agent, "containers", container_id, partial(dict.update, init=other, monitor=other, state=state))
    own_agent.start()
    assert bystander.poll() is None
    pids = [_init_pid(own_agent, container_id) for _, container_id in pods]
    for (_, container_id), pid in zip(pods, pids, strict=True):
        assert own_agent.client.exec(container_id, "true").exit_code == 0
        assert own_agent.client.status(container_id).state == cri_pb2.CONTAINER_RUNNING
        own_agent.client.stop(container_id, 0)
        assert own_agent.client.status(container_id).exit_code == 137
        assert not _alive(pid)
    _end_all(own_agent)
    assert own_agent.client.findings() == []
    assert bystander.poll() is None


def test_no_other_cgroup_is_killed(own_agent: AgentProcess, bystander: subprocess.Popen[bytes]) -> None:
    other = f"/podkeel-bystander-{os.getpid()}"
    first, second, third = (run_container(own_agent, "sleep", "1000") for _ in range(3))
    config = sandbox_config(own_agent)
    alone = own_agent.client.run_sandbox(config)
    pids = [_init_pid(own_agent, container_id) for _, container_id in (first, second, third)]
    own_agent.kill()

    def climb(record: dict[str, object]) -> None:
        record["cgroup"] = f"{record['cgroup']}/../../..{other}"
        record["private_pid_namespace"] = False

    def climb_parent(record: dict[str, object]) -> None:
        record["cgroup_parent"] = f"{record['cgroup_parent']}/../..{other}"

    _change(own_agent, "containers", first[1], climb)
    _change(own_agent, "containers", second[1], lambda record: record.update(cgroup=f"{other}/../{second[1]}"))
    _change(own_agent, "containers", third[1], lambda record: record.update(cgroup=f"{other}-{third[1]}/.."))
    _change(own_agent, "sandboxes", alone, climb_parent)
    own_agent.start()
    told = own_agent.client.findings()
    for key in (first[1], second[1], third[1], alone):
        assert any(f"row {key}" in finding for finding in told), told
    _end_all(own_agent)
    assert bystander.poll() is None
    assert not [pid for pid in pids if _alive(pid)]


def test_no_other_process_is_ended_as_the_init_of_a_pod(
    own_agent: AgentProcess, bystander: subprocess.Popen[bytes]
) -> None:
    config = sandbox_config(own_agent)
    shared_pids(config)
    sandbox_id = own_agent.client.run_sandbox(config)
    main = container_config("main", "sleep", "1000")
    shared_pids(main)
    own_agent.client.start(own_agent.client.create(sandbox_id, main, config))
    holder: list[dict[str, int]] = []

    def lie(record: dict[str, object]) -> None:
        held = record["pid_holder"]
        assert isinstance(held, dict)
        holder.append(held)
        record["pid_holder"] = _name(bystander.pid)

    own_agent.kill()
    _change(own_agent, "sandboxes", sandbox_id, lie)
    own_agent.start()
    _end_all(own_agent)
    assert bystander.poll() is None
    assert not _alive(holder[0]["pid"])


def test_the_init_of_a_pod_whose_row_is_lost_is_ended(own_agent: AgentProcess) -> None:
    config = sandbox_config(own_agent)
    shared_pids(config)
    sandbox_id = own_agent.client.run_sandbox(config)
    main = container_config("main", "sleep", "1000")
    shared_pids(main)
    container_id = own_agent.client.create(sandbox_id, main, config)
    own_agent.client.start(container_id)
    with _store(own_agent) as store:
        ((record,),) = store.execute("SELECT record FROM sandboxes").fetchall()
    holder = msgspec.msgpack.decode(record)["pid_holder"]["pid"]
    assert _alive(holder)
    own_agent.kill()
    with _store(own_agent) as store:
        store.execute("UPDATE sandboxes SET record = x''")
    own_agent.start()
    wait_for(lambda: not _alive(holder), what="the end of the init")
    assert all("row" in finding for finding in own_agent.client.findings())


def test_no_other_file_is_removed(own_agent: AgentProcess, tmp_path: Path) -> None:
    _, container_id = run_container(own_agent, "sleep", "1000")
    folder, file = tmp_path / "precious", tmp_path / "precious-file"
    (folder / "inside").mkdir(parents=True)
    file.touch()
    own_agent.kill()
    up = "../" * 20
    with _store(own_agent) as store:
        rows = [
            (name, name, "x", "[]") for name in (f"{up}{folder}", str(folder), f"x/{up}{folder}", "..", ".", "", "/")
        ]
        store.executemany("INSERT INTO snapshots (id, container_id, image_id, layers) VALUES (?, ?, ?, ?)", rows)
        for number, digest in enumerate((f"sha256:{up}{file}", f":{file}", f"{up}:{file}", "..:..", "")):
            values = (1000 + number, f"sha256:{number:064}", f"sha256:{number:064}", digest)
            store.execute(
                "INSERT INTO layers (number, chain_id, diff_id, blob_digest, blob_bytes, used_bytes, used_inodes, "
                "opaque, ready) VALUES (?, ?, ?, ?, 1, 1, 1, 0, 2)",
                values,
            )
            (own_agent.data / "layers" / str(1000 + number) / "fs").mkdir(parents=True)
    own_agent.start()
    assert (folder / "inside").is_dir()
    assert file.exists()
    assert own_agent.client.exec(container_id, "true").exit_code == 0
    _end_all(own_agent)
    own_agent.restart()
    assert (folder / "inside").is_dir()
    assert file.exists()


_OTHER_LINK = "other0"
_LIES_OF_LINKS: list[dict[str, object]] = [
    {"host_interface": _OTHER_LINK},
    {"limiter": _OTHER_LINK},
    {"addresses": ["nonsense"]},
    {"gateways": ["1.2.3.4.5"]},
    {"mac": "zz"},
    {"interface": f"../{_OTHER_LINK}"},
    {"netns_path": "/proc/1/ns/net"},
]


def test_no_other_link_is_changed(own_agent: AgentProcess) -> None:
    subprocess.run(["ip", "link", "add", _OTHER_LINK, "type", "bridge"], check=True)
    try:
        pods = [run_container(own_agent, "sleep", "1000") for _ in _LIES_OF_LINKS]
        addresses = [own_agent.client.sandbox_status(sandbox_id).network.ip for sandbox_id, _ in pods]
        own_agent.kill()
        with _store(own_agent) as store:
            for (sandbox_id, _), lie in zip(pods, _LIES_OF_LINKS, strict=True):
                where = "WHERE sandbox_id = ?"
                select = f"SELECT attachment FROM network_attachments {where}"
                ((row,),) = store.execute(select, (sandbox_id,)).fetchall()
                changed = msgspec.json.encode({**msgspec.json.decode(row), **lie})
                store.execute(f"UPDATE network_attachments SET attachment = ? {where}", (changed, sandbox_id))
        own_agent.start()
        for (sandbox_id, container_id), address in zip(pods, addresses, strict=True):
            assert own_agent.client.sandbox_status(sandbox_id).network.ip == address
            assert address in own_agent.client.output(container_id, "ip", "-4", "addr", "show", "eth0")
        _end_all(own_agent)
        subprocess.run(["ip", "link", "show", _OTHER_LINK], check=True, stdout=subprocess.DEVNULL)
        run_container(own_agent, "true")
    finally:
        with NetlinkSocket(NETLINK_ROUTE) as route:
            route.exchange([delete_link(_OTHER_LINK)])


def test_no_other_folder_is_removed_by_the_name_of_a_handler(own_agent: AgentProcess) -> None:
    handlers = ["../../../../tmp", "/tmp", "unknown"]
    pods = [run_container(own_agent, "sleep", "1000") for _ in handlers]
    precious = [Path(f"/tmp/{container_id}") for _, container_id in pods]
    for folder in precious:
        folder.mkdir()
    try:
        pids = [_init_pid(own_agent, container_id) for _, container_id in pods]
        own_agent.kill()
        for (_, container_id), handler in zip(pods, handlers, strict=True):
            _change(own_agent, "containers", container_id, partial(dict.update, handler=handler))
        own_agent.start()
        _end_all(own_agent)
        assert [folder for folder in precious if not folder.is_dir()] == []
        assert not [pid for pid in pids if _alive(pid)]
    finally:
        for folder in precious:
            folder.rmdir()
