"""A store with rows that cannot be read, and a store that is missing, empty or damaged."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.support.agent import BUSYBOX, SOON, AgentProcess, wait_for
from tests.support.pods import container_config, run_container, sandbox_config

_HALF = "substr({column}, 1, length({column}) / 2)"
_DAMAGES = {
    "empty": "x''",
    "half": _HALF,
    "NULs": "zeroblob(64)",
    "text": "'nonsense'",
    "null bytes in the middle": "CAST(substr({column}, 1, 3) || x'00000000' || substr({column}, 4) AS BLOB)",
}


@contextlib.contextmanager
def _store(agent: AgentProcess) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(agent.data / "podkeel.db", isolation_level=None)
    try:
        yield connection
    finally:
        connection.close()


def _states(agent: AgentProcess) -> dict[str, int]:
    containers = agent.client.call("ListContainers", cri_pb2.ListContainersRequest()).containers
    return {container.id: container.state for container in containers}


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _init_pid(agent: AgentProcess, container_id: str) -> int:
    return int((agent.run / "containers" / container_id / "init.pid").read_text())


_PLACES = [("containers", "record"), ("containers", "config"), ("sandboxes", "record"), ("sandboxes", "config")]


def test_unreadable_rows_are_set_aside_and_other_pods_keep_running(own_agent: AgentProcess) -> None:
    cases = [(table, column, damage) for table, column in _PLACES for damage in _DAMAGES.values()]
    pods = [run_container(own_agent, "sleep", "1000") for _ in cases]
    good = run_container(own_agent, "sleep", "1000")
    pids = [_init_pid(own_agent, container_id) for _, container_id in pods]
    own_agent.kill()
    broken = {}
    with _store(own_agent) as store:
        for (table, column, damage), (sandbox_id, container_id) in zip(cases, pods, strict=True):
            key = container_id if table == "containers" else sandbox_id
            broken[key] = (table, column, damage)
            store.execute(f"UPDATE {table} SET {column} = {damage.format(column=column)} WHERE id = ?", (key,))
    own_agent.start()
    told = own_agent.client.findings()
    unnoticed = [case for key, case in broken.items() if not any(f"row {key}" in finding for finding in told)]
    assert [case for case in unnoticed if case[1] == "record" or case[2] != _HALF] == []  # half of one may be valid
    states = _states(own_agent)
    assert states[good[1]] == cri_pb2.CONTAINER_RUNNING
    assert own_agent.client.exec(good[1], "true").exit_code == 0
    assert len(states) == 1 + len(unnoticed)
    gone = [pid for pid, (_, container_id) in zip(pids, pods, strict=True) if container_id not in states]
    assert not [pid for pid in gone if _alive(pid)]
    command = own_agent.command("check", "--repair", *own_agent.flags)
    assert "set aside" in subprocess.run(command, check=False, capture_output=True, text=True).stdout
    assert own_agent.client.findings() == []
    run_container(own_agent, "true")


@pytest.mark.parametrize("damage", ["x''", _HALF, "zeroblob(64)"], ids=["empty", "half", "NULs"])
def test_an_unreadable_image_is_set_aside(own_agent: AgentProcess, damage: str) -> None:
    _, container_id = run_container(own_agent, "sleep", "1000")
    own_agent.kill()
    with _store(own_agent) as store:
        store.execute(f"UPDATE images SET config = {damage.format(column='config')}")
        store.execute("UPDATE snapshots SET layers = '[1,'")
    own_agent.start()
    assert own_agent.client.call("ListImages", cri_pb2.ListImagesRequest()).images == []
    assert [finding.split()[0] for finding in own_agent.client.findings()] == ["image"]
    assert own_agent.client.exec(container_id, "true").exit_code == 0


@pytest.mark.parametrize("damage", ["gone", "x''", _HALF], ids=["gone", "empty", "half"])
def test_a_lost_attachment_is_made_again(own_agent: AgentProcess, damage: str) -> None:
    sandbox_id, container_id = run_container(own_agent, "sleep", "1000")
    address = own_agent.client.sandbox_status(sandbox_id).network.ip
    gone = own_agent.client.run_sandbox(sandbox_config(own_agent))
    own_agent.kill()
    with _store(own_agent) as store:
        if damage == "gone":
            store.execute("DELETE FROM network_attachments")
        else:
            store.execute(f"UPDATE network_attachments SET attachment = {damage.format(column='attachment')}")
        store.execute("DELETE FROM sandboxes WHERE id = ?", (gone,))
    own_agent.start()
    assert own_agent.client.sandbox_status(sandbox_id).network.ip == address
    assert address in own_agent.client.output(container_id, "ip", "-4", "addr", "show", "eth0")
    assert not [finding for finding in own_agent.client.findings() if not finding.startswith("attachment row")]
    with _store(own_agent) as store:
        held = "SELECT sandbox_id FROM network_addresses WHERE released_at IS NULL"
        assert store.execute(held).fetchall() == [(sandbox_id,)]
    own_agent.client.stop_sandbox(sandbox_id)
    own_agent.client.remove_sandbox(sandbox_id)
    with _store(own_agent) as store:
        assert store.execute(held).fetchall() == []


def _delete(path: Path) -> None:
    for ending in ("", "-wal", "-shm"):
        path.with_name(f"{path.name}{ending}").unlink(missing_ok=True)


def _empty(path: Path) -> None:
    _delete(path)
    path.touch()


def _truncate_tables(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as store:
        store.executescript("DELETE FROM containers; DELETE FROM sandboxes;")


def _garble(path: Path) -> None:
    _delete(path)
    path.write_bytes(b"nonsense" * 1000)


def _cut(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as store:
        store.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = path.read_bytes()
    _delete(path)
    path.write_bytes(content[:4096] + b"\xff" * 8192 + content[12288:])


def _forget_the_newest(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as store, store:
        store.execute("DELETE FROM containers WHERE created_at = (SELECT max(created_at) FROM containers)")


def _lose_the_log(path: Path) -> None:
    for ending in ("-wal", "-shm"):
        path.with_name(f"{path.name}{ending}").unlink()


def _damage_the_log(path: Path) -> None:
    log = path.with_name(f"{path.name}-wal")
    log.write_bytes(bytes(byte ^ 0xFF for byte in log.read_bytes()))


_LOSSES = [
    *(_delete, _empty, _truncate_tables, _garble, _cut),
    *(_forget_the_newest, _lose_the_log, _damage_the_log),
]


def _refusal(agent: AgentProcess, *more: str) -> str:
    command = agent.command("serve", *more, *agent.flags)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("lose", _LOSSES)
def test_a_lost_store_ends_no_container_and_its_copy_is_adopted(
    own_agent: AgentProcess, lose: Callable[[Path], None]
) -> None:
    run_container(own_agent, "sleep", "1000")
    sandbox_id, container_id = run_container(own_agent, "sleep", "1000")
    copy = own_agent.data / "podkeel-copy.db"

    def copied() -> bool:
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(copy)) as store:
            rows = store.execute("SELECT * FROM containers WHERE id = ?", (container_id,)).fetchall()
            return "running" in str(rows)  # and not only that it is being made
        return False

    wait_for(copied, seconds=5, what="a copy that knows the container")
    assert copy.stat().st_mode & 0o777 == 0o600
    pid = _init_pid(own_agent, container_id)
    own_agent.kill()
    lose(own_agent.data / "podkeel.db")
    for _ in range(2):
        said = _refusal(own_agent)
        assert str(copy) in said
        assert "--adopt" in said
        assert "podkeel reset" in said
        assert container_id[:13] in said
    assert _alive(pid)
    adopting = subprocess.Popen(own_agent.command("serve", "--adopt", *own_agent.flags), stderr=subprocess.PIPE)
    try:
        assert adopting.stderr is not None
        for line in adopting.stderr:
            if b"serving the CRI" in line:
                break
    finally:
        adopting.terminate()
        adopting.communicate(timeout=SOON)
    own_agent.start()
    assert _states(own_agent)[container_id] == cri_pb2.CONTAINER_RUNNING
    assert own_agent.client.exec(container_id, "true").exit_code == 0
    assert own_agent.client.call(
        "ImageStatus", cri_pb2.ImageStatusRequest(image=cri_pb2.ImageSpec(image=BUSYBOX))
    ).image.id
    assert own_agent.client.findings() == []
    own_agent.client.stop_sandbox(sandbox_id)
    own_agent.client.remove_sandbox(sandbox_id)


def _lose_all(agent: AgentProcess) -> None:
    agent.kill()
    _delete(agent.data / "podkeel.db")
    _delete(agent.data / "podkeel-copy.db")


def _adopt(agent: AgentProcess) -> None:
    """Start once with --adopt, and then without."""
    adopting = subprocess.Popen(agent.command("serve", "--adopt", *agent.flags), stderr=subprocess.PIPE)
    assert adopting.stderr is not None
    try:
        said = []
        for line in adopting.stderr:
            said.append(line)
            if b"serving the CRI" in line:
                break
        else:
            raise AssertionError(b"".join(said).decode())
    finally:
        adopting.terminate()
        adopting.communicate(timeout=SOON)
    agent.start()


def test_without_store_and_copy_no_container_ends_before_a_reset(own_agent: AgentProcess) -> None:
    _, container_id = run_container(own_agent, "sleep", "1000")
    rows = own_agent.run / "containers" / container_id / "rows"
    wait_for(rows.exists)
    pid = _init_pid(own_agent, container_id)
    _lose_all(own_agent)
    said = _refusal(own_agent)
    assert "podkeel-copy.db is missing" in said
    assert f"--adopt` to continue with the 1 containers in {own_agent.run}" in said
    rows.unlink()
    assert "--adopt" not in _refusal(own_agent)
    assert f"{own_agent.run} has rows of no container" in _refusal(own_agent, "--adopt")
    assert _alive(pid)
    own_agent.reset()
    assert not _alive(pid)


def _visible(agent: AgentProcess) -> list[object]:
    """Pods, containers and images as clients see them."""
    client = agent.client
    pods = client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest()).items
    containers = client.call("ListContainers", cri_pb2.ListContainersRequest()).containers
    images = client.call("ListImages", cri_pb2.ListImagesRequest()).images
    statuses = [client.sandbox_status(pod.id) for pod in pods], [client.status(one.id) for one in containers]
    return [pods, containers, *statuses, images]


@pytest.mark.parametrize("user_namespace", [False, True], ids=["", "user namespace"])
def test_pods_are_restored_from_the_run_folder_if_store_and_copy_are_lost(
    own_agent: AgentProcess, user_namespace: bool
) -> None:
    client = own_agent.client
    sandbox = sandbox_config(own_agent, labels={"app": "lost"}, annotations={"note": "ü\n"})
    sandbox.metadata.attempt = 3
    sandbox.port_mappings.add(container_port=80, host_port=18080, protocol=cri_pb2.TCP)
    if user_namespace:
        mapping = cri_pb2.IDMapping(host_id=1_000_000, container_id=0, length=65536)
        sandbox.linux.security_context.namespace_options.userns_options.CopyFrom(
            cri_pb2.UserNamespace(mode=cri_pb2.POD, uids=[mapping], gids=[mapping])
        )
    sandbox_id = client.run_sandbox(sandbox)
    containers = []
    for name, script in (("main", "echo before; trap 'exit 7' TERM; while :; do sleep 0.05; done"), ("done", "exit 5")):
        config = container_config(name, "sh", "-c", script, labels={"part": name}, annotations={"why": "test"})
        config.metadata.attempt = 2
        if user_namespace:
            config.linux.security_context.namespace_options.CopyFrom(sandbox.linux.security_context.namespace_options)
        containers.append(client.create(sandbox_id, config, sandbox))
        client.start(containers[-1])
    main, done = containers
    wait_for(lambda: client.status(done).state == cri_pb2.CONTAINER_EXITED)
    created = client.create(sandbox_id, container_config("created", "true", linux=config.linux), sandbox)
    wait_for(lambda: all((own_agent.run / "containers" / one / "rows").exists() for one in (*containers, created)))
    before = _visible(own_agent)
    address = client.sandbox_status(sandbox_id).network.ip
    own_agent.stop()  # writes the latest rows
    _lose_all(own_agent)
    assert main[:13] in _refusal(own_agent)
    _adopt(own_agent)
    client = own_agent.client
    assert _visible(own_agent) == before
    assert client.findings() == []
    assert address in client.output(main, "ip", "-4", "addr", "show", "eth0")
    assert client.run_sandbox(sandbox) == sandbox_id  # the call returns the existing pod
    assert client.sandbox_status(client.run_sandbox(sandbox_config(own_agent))).network.ip != address
    client.call("ReopenContainerLog", cri_pb2.ReopenContainerLogRequest(container_id=main))
    assert "before" in Path(client.status(main).log_path).read_text()
    client.start(created)
    client.stop(main, timeout=20)
    assert client.status(main).exit_code == 7
    client.remove(main)
    client.stop_sandbox(sandbox_id)
    client.remove_sandbox(sandbox_id)
    assert client.findings() == []
    with _store(own_agent) as store:
        held = "SELECT count(*) FROM network_addresses WHERE address = ? AND released_at IS NULL"
        assert store.execute(held, (address,)).fetchall() == [(0,)]
        ports = "SELECT count(*) FROM network_host_ports UNION ALL SELECT count(*) FROM snapshots"
        assert store.execute(ports).fetchall() == [(0,), (0,)]
    assert list((own_agent.data / "containers").iterdir()) == []
    run_container(own_agent, "true")


def test_an_unreadable_file_of_rows_affects_only_its_container(own_agent: AgentProcess) -> None:
    pods = [run_container(own_agent, "sleep", "1000") for _ in range(3)]
    files = [own_agent.run / "containers" / container_id / "rows" for _, container_id in pods]
    wait_for(lambda: all(file.exists() for file in files))
    own_agent.stop()
    _lose_all(own_agent)
    files[0].write_bytes(files[0].read_bytes()[:-40])
    files[1].write_bytes(files[1].read_bytes().replace(b"containers", b"sandboxesX"))
    _adopt(own_agent)
    assert list(_states(own_agent)) == [pods[2][1]]
    assert own_agent.client.exec(pods[2][1], "true").exit_code == 0
    assert own_agent.client.findings() == []


# Layer numbers of the store that differ from those in the copy: the image was removed and pulled again since.
_OTHER_NUMBERS = {
    "other number": "UPDATE layers SET number = number + 100; UPDATE image_layers SET layer = layer + 100;",
    "number of another layer": (
        "UPDATE layers SET chain_id = 'sha256:' || hex(zeroblob(32)), diff_id = 'sha256:' || hex(zeroblob(32));"
        "UPDATE images SET id = 'sha256:' || lower(hex(zeroblob(32)));"
        "UPDATE image_layers SET image_id = 'sha256:' || lower(hex(zeroblob(32)));"
        "UPDATE image_references SET image_id = 'sha256:' || lower(hex(zeroblob(32)));"
    ),
}


@pytest.mark.parametrize("others", _OTHER_NUMBERS)
@pytest.mark.parametrize("known", [False, True], ids=["unknown to the copy", "known to it"])
def test_layers_keep_the_numbers_that_running_containers_use(own_agent: AgentProcess, others: str, known: bool) -> None:
    sandbox_id, container_id = run_container(own_agent, "sleep", "1000")
    wait_for((own_agent.run / "containers" / container_id / "rows").exists)
    own_agent.stop()
    store, copy = own_agent.data / "podkeel.db", own_agent.data / "podkeel-copy.db"
    with contextlib.closing(sqlite3.connect(store)) as source, contextlib.closing(sqlite3.connect(copy)) as target:
        source.backup(target)
        target.executescript(f"PRAGMA foreign_keys=OFF; {_OTHER_NUMBERS[others]}")
        if known:
            target.execute("UPDATE snapshots SET layers = '[101]'")
        else:
            target.executescript("DELETE FROM snapshots; DELETE FROM containers;")
        target.commit()
    _delete(store)
    _adopt(own_agent)
    assert _states(own_agent) == {container_id: cri_pb2.CONTAINER_RUNNING}
    assert own_agent.client.exec(container_id, "true").exit_code == 0
    assert own_agent.client.findings() == []
    own_agent.client.stop_sandbox(sandbox_id)
    own_agent.client.remove_sandbox(sandbox_id)
    if others == "other number":  # otherwise the copy says that the reference belongs to an image that is gone
        run_container(own_agent, "true")
    assert own_agent.client.findings() == []


def test_a_new_store_is_made_if_no_container_runs_and_the_copy_stays(own_agent: AgentProcess) -> None:
    config = sandbox_config(own_agent)
    own_agent.client.run_sandbox(config)
    own_agent.stop()
    _delete(own_agent.data / "podkeel.db")
    own_agent.start()
    assert own_agent.client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest()).items == []
    assert own_agent.client.findings() == []
    # Another copy may be in the making: podkeel-copy.db.new.
    (kept,) = own_agent.data.glob("podkeel-copy.db.[0-9]*[0-9]")
    with contextlib.closing(sqlite3.connect(kept)) as store:
        assert store.execute("SELECT count(*) FROM sandboxes").fetchall() == [(1,)]
    with pytest.raises(grpc.RpcError, match="not on this node"):
        sandbox_id = own_agent.client.run_sandbox(config)
        own_agent.client.create(sandbox_id, container_config("main", "true"), config)
