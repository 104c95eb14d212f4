"""RestorePod: a new pod whose containers continue where those of a checkpoint were."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess, wait_for
from tests.support.checkpoints import (
    COUNTER,
    checkpoint_pod,
    lines_of,
    restore_pod,
    run_pod,
    wait_for_lines,
)
from tests.support.pods import POLITE, container_config, sandbox_config, shared_pids, wait_for_log

SENDER = (
    "sh",
    "-c",
    "i=0; while :; do i=$((i+1)); echo $i > /dev/shm/new; mv /dev/shm/new /dev/shm/sent; echo $i; sleep 0.01; done",
)
RECEIVER = ("sh", "-c", "while :; do read got < /dev/shm/sent && echo $got; sleep 0.02; done")


@pytest.fixture
def left(agent: AgentProcess) -> Iterator[Callable[[], None]]:
    """Asserts that nothing is there of pods that could not be restored."""
    before = pods_of(agent)

    def assert_nothing() -> None:
        # A client that left does not wait for the clean-up. What was taken of the checkpoint is removed first.
        wait_for(lambda: not any((agent.data / "checkpoints").glob("*")), what="nothing left of the checkpoint")
        wait_for(lambda: pods_of(agent) == before, what="nothing left of the pod")
        wait_for(lambda: agent.client.findings() == [], what="no difference between store and node")

    yield assert_nothing


def pods_of(agent: AgentProcess) -> set[str]:
    """The ids of all pods and containers."""
    pods = agent.client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest()).items
    containers = agent.client.call("ListContainers", cri_pb2.ListContainersRequest()).containers
    return {each.id for each in (*pods, *containers)}


def saved(agent: AgentProcess, place: Path, *configs: cri_pb2.ContainerConfig, shared: bool = False) -> None:
    """Write a checkpoint of a pod with these containers to ``place``; the pod is removed."""
    sandbox = sandbox_config(agent)
    if shared:
        shared_pids(sandbox)
    sandbox_id, ids = run_pod(agent, *configs, sandbox=sandbox)
    for container_id in ids:
        wait_for_lines(agent, container_id, 5)
    place.mkdir(exist_ok=True)
    checkpoint_pod(agent, sandbox_id, place, ids)
    agent.client.stop_sandbox(sandbox_id)
    agent.client.remove_sandbox(sandbox_id)


def refusal(agent: AgentProcess, place: Path | str, *configs: cri_pb2.ContainerConfig, **fields: Any) -> str:
    """Code and message of the error."""
    with pytest.raises(grpc.RpcError) as failure:
        restore_pod(agent, place, *configs, **fields)
    return f"{failure.value.code().name}: {failure.value.details()}"


def tree(folder: Path) -> dict[str, tuple[int, int, int, str]]:
    """All that a folder holds, and when it was changed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.stat()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns, digest)
    return found


@pytest.mark.parametrize("shared", [False, True], ids=["own-pids", "shared-pids"])
def test_containers_continue_at_one_moment(agent: AgentProcess, crun: str, tmp_path: Path, *, shared: bool) -> None:
    configs = [container_config("sender", *SENDER), container_config("receiver", *RECEIVER)]
    sandbox = sandbox_config(agent)
    if shared:
        shared_pids(sandbox)
        for config in configs:
            shared_pids(config)
    saved(agent, tmp_path / "it", *configs, shared=shared)
    before = tree(tmp_path / "it")
    sandbox_id, ids = restore_pod(agent, tmp_path / "it", *configs, sandbox=sandbox)
    assert list(ids) == ["sender", "receiver"]
    for container_id in ids.values():
        status = agent.client.status(container_id)
        assert status.state == cri_pb2.CONTAINER_CREATED
        assert lines_of(agent, container_id) == []
    agent.client.start(ids["receiver"])
    got = [int(line) for line in wait_for_lines(agent, ids["receiver"], 3)]
    assert len(set(got)) == 1  # the other has executed nothing
    assert lines_of(agent, ids["sender"]) == []
    agent.client.start(ids["sender"])
    sent = [int(line) for line in wait_for_lines(agent, ids["sender"], 5)]
    assert got[0] in (sent[0], sent[0] - 1)  # it never knows of more than was sent
    assert sent == list(range(sent[0], sent[0] + len(sent)))
    wait_for(lambda: int(lines_of(agent, ids["receiver"])[-1]) > sent[0], what="the next number")
    assert tree(tmp_path / "it") == before
    # It is a pod like any other.
    stats = agent.client.call("ContainerStats", cri_pb2.ContainerStatsRequest(container_id=ids["sender"])).stats
    assert stats.memory.usage_bytes.value
    assert agent.client.output(ids["sender"], "cat", "/etc/hostname") == f"{sandbox.hostname}\n"
    (tmp_path / "again").mkdir()
    checkpoint_pod(agent, sandbox_id, tmp_path / "again", list(ids.values()))
    for container_id in ids.values():
        wait_for_lines(agent, container_id, 3)
    agent.client.stop_sandbox(sandbox_id)
    assert agent.client.status(ids["sender"]).exit_code == 137
    agent.client.remove_sandbox(sandbox_id)
    wait_for(lambda: agent.client.findings() == [], what="no difference between store and node")


@pytest.mark.parametrize("shared", [False, True], ids=["own-pids", "shared-pids"])
def test_they_talk_over_localhost_a_volume_and_shared_memory(
    agent: AgentProcess, crun: str, tmp_path: Path, *, shared: bool
) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    mount = cri_pb2.Mount(host_path=str(volume), container_path="/data")
    server = (
        "mkdir /www; echo served > /www/it; httpd -f -p 127.0.0.1:7000 -h /www & exec 3>>/data/log; i=0;"
        " while :; do i=$((i+1)); echo $i > /dev/shm/new; mv /dev/shm/new /dev/shm/count; echo $i >&3; sleep 0.1; done"
    )
    client = (
        "while :; do wget -q -T 5 -O - http://127.0.0.1:7000/it || echo refused;"
        " cat /data/word 2>/dev/null; echo count $(cat /dev/shm/count); sleep 0.05; done"
    )
    configs = [
        container_config("server", "sh", "-c", server, mounts=[mount]),
        container_config("client", "sh", "-c", client, mounts=[mount]),
    ]
    sandbox = sandbox_config(agent)
    new = sandbox_config(agent)
    if shared:
        shared_pids(sandbox)
        shared_pids(new)
        for config in configs:
            shared_pids(config)
    sandbox_id, old = run_pod(agent, *configs, sandbox=sandbox)
    wait_for_log(agent.client, old[1], "served")
    wait_for(lambda: [number for number in counts_of(agent, old[1]) if number >= 5], what="what the other counts")
    place = tmp_path / "place"
    place.mkdir()
    try:
        checkpoint_pod(agent, sandbox_id, place, old)
    except grpc.RpcError as error:
        if "CRIU before 4.2" not in error.details():
            raise
        pytest.skip("this CRIU cannot save network sockets on this kernel")
    before = (volume / "log").read_text()
    wait_for(lambda: len((volume / "log").read_text()) > len(before), what="more in the volume than when it was saved")
    agent.client.stop_sandbox(sandbox_id)
    agent.client.remove_sandbox(sandbox_id)
    before = (volume / "log").read_text()
    _, ids = restore_pod(agent, place, *configs, sandbox=new)
    for name in ("client", "server"):
        agent.client.start(ids[name])
    wait_for_log(agent.client, ids["client"], "served")
    (volume / "word").write_text("written\n")
    wait_for_log(agent.client, ids["client"], "written")
    wait_for(lambda: len((volume / "log").read_text()) > len(before), what="more in the volume")
    assert (volume / "log").read_text().startswith(before)
    counts = counts_of(agent, ids["client"])
    assert counts[0] >= 5
    assert counts == sorted(counts)


def counts_of(agent: AgentProcess, container_id: str) -> list[int]:
    """What a container that logs ``count`` and a number has read."""
    return [int(line.split()[1]) for line in lines_of(agent, container_id) if re.fullmatch(r"count \d+", line)]


def test_restored_twice_at_once(agent: AgentProcess, crun: str, tmp_path: Path) -> None:
    configs = [container_config(name, *COUNTER) for name in ("first", "second")]
    saved(agent, tmp_path / "it", *configs)
    results: list[dict[str, str]] = []

    def one() -> None:
        _, ids = restore_pod(agent, tmp_path / "it", *configs)
        for container_id in ids.values():
            agent.client.start(container_id)
        results.append(ids)

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    for name in ("first", "second"):
        begins = [int(wait_for_lines(agent, ids[name], 3)[0]) for ids in results]
        assert abs(begins[0] - begins[1]) <= 1
        assert min(begins) > 3
    for ids in results:
        assert agent.client.exec(ids["first"], "test", "-e", "/etc/passwd").exit_code == 1
        assert agent.client.output(ids["first"], "cat", "/made/file") == "new\n"


def test_differences_from_the_checkpoint_are_named(
    agent: AgentProcess, crun: str, tmp_path: Path, left: Callable[[], None]
) -> None:
    secret = cri_pb2.KeyValue(key="TOKEN", value=b"hidden")
    config = container_config("main", *COUNTER, envs=[secret])
    saved(agent, tmp_path / "it", config)

    def changed(**fields: Any) -> cri_pb2.ContainerConfig:
        return cri_pb2.ContainerConfig.FromString(
            container_config("main", *COUNTER, **{"envs": [secret], **fields}).SerializeToString()
        )

    other = cri_pb2.ContainerConfig()
    other.CopyFrom(config)
    other.command[2] = "echo other"
    hidden = cri_pb2.KeyValue(key="TOKEN", value=b"other")
    second = container_config("second", *COUNTER)
    dropped = changed()
    dropped.linux.security_context.capabilities.drop_capabilities.append("ALL")
    for configs, words in (
        ([other], "differs from the checkpoint, whose processes were started with another one: command"),
        ([changed(args=["x"])], "already: args"),
        ([changed(working_dir="/tmp")], "already: working_dir"),
        ([changed(envs=[hidden])], "already: envs 'TOKEN'"),
        ([changed(stdin=True)], "already: stdin"),
        ([changed(mounts=[cri_pb2.Mount(host_path=str(tmp_path), container_path="/new")])], "/new"),
        ([dropped], "capabilities that the configuration does not give"),
        ([], "container_configs is empty"),
        ([config, config], "twice"),
        ([second], "'main' is missing; 'second' is not in the checkpoint"),
        ([config, second], "'second' is not in the checkpoint"),
    ):
        message = refusal(agent, tmp_path / "it", *configs)
        assert message.startswith("INVALID_ARGUMENT: "), message
        assert words in message
        assert "hidden" not in message
    assert refusal(agent, tmp_path / "it", changed(image="missing.example/it:1")).startswith("NOT_FOUND")
    assert refusal(agent, tmp_path / "it", config, handler="missing").startswith("NOT_FOUND")
    assert refusal(agent, tmp_path / "missing", config).startswith("NOT_FOUND")
    assert "not an absolute path" in refusal(agent, "relative", config)
    assert "'speed'" in refusal(agent, tmp_path / "it", config, options={"speed": "1"})
    node = sandbox_config(agent)
    node.linux.security_context.namespace_options.network = cri_pb2.NODE
    assert "uses the network of the node" in refusal(agent, tmp_path / "it", config, sandbox=node)
    left()


def test_an_existing_pod_is_left_alone(agent: AgentProcess, crun: str, tmp_path: Path) -> None:
    config = container_config("main", *COUNTER)
    saved(agent, tmp_path / "it", config)
    sandbox = sandbox_config(agent)
    sandbox_id, ids = run_pod(agent, container_config("other", *POLITE), sandbox=sandbox)
    assert refusal(agent, tmp_path / "it", config, sandbox=sandbox).startswith("ALREADY_EXISTS")
    assert agent.client.status(ids[0]).state == cri_pb2.CONTAINER_RUNNING
    restored = sandbox_config(agent)
    first, _ = restore_pod(agent, tmp_path / "it", config, sandbox=restored)
    assert refusal(agent, tmp_path / "it", config, sandbox=restored).startswith("ALREADY_EXISTS")
    status = agent.client.call("PodSandboxStatus", cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=first)).status
    assert status.state == cri_pb2.SANDBOX_READY
    assert sandbox_id != first


def _document(place: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((place / "pod.json").read_text())
    change(content)
    (place / "pod.json").write_text(json.dumps(content))


def _to_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no-document": (lambda place: (place / "pod.json").unlink(), "no checkpoint of a pod"),
    "garbage": (lambda place: (place / "pod.json").write_text("[" * 100_000), "cannot be read"),
    "version": (lambda place: _document(place, lambda it: it.update(version=2)), "version 2"),
    "machine": (lambda place: _document(place, lambda it: it.update(machine="s390x")), "made on 's390x'"),
    "leads-out": (
        lambda place: _document(place, lambda it: it["containers"][0].update(folder="containers/../../x")),
        "the invalid folder",
    ),
    "folder-missing": (
        lambda place: _document(place, lambda it: it["containers"][0].update(folder="containers/7")),
        "has no containers/7",
    ),
    "twice": (lambda place: _document(place, lambda it: it["containers"].append(it["containers"][0])), "one name"),
    "document-link": (lambda place: _to_link(place / "pod.json"), "a link"),
    "folder-link": (lambda place: _to_link(place / "containers/0"), "a link"),
    "parent-link": (lambda place: _to_link(place / "containers"), "a link"),
    "images-link": (lambda place: _to_link(place / "containers/0/checkpoint"), "a link"),
    "image-link": (lambda place: _to_link(place / "containers/0/checkpoint/pstree.img"), "a link"),
    "fifo": (lambda place: os.mkfifo(place / "containers/0/checkpoint/pages-9.img"), "not a regular file"),
    "odd-name": (lambda place: (place / "containers/0/checkpoint/.hidden").touch(), "'.hidden'"),
    "no-images": (lambda place: shutil.rmtree(place / "containers/0/checkpoint"), "has no checkpoint"),
    "cut": (lambda place: _cut(next((place / "containers/0/checkpoint").glob("core-*.img"))), "core-"),
    "huge": (lambda place: _grow(place / "containers/0/checkpoint/pages-9.img"), "is too large"),
}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def _grow(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 43)


def test_hostile_folders(agent: AgentProcess, crun: str, tmp_path: Path, left: Callable[[], None]) -> None:
    config = container_config("main", *COUNTER)
    good = tmp_path / "good"
    saved(agent, good, config)
    for name, (change, words) in HOSTILE.items():
        place = tmp_path / name
        shutil.copytree(good, place)
        change(place)
        message = refusal(agent, place, config)
        assert words in message, name
        assert message.startswith(("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED")), (name, message)
    left()
    restore_pod(agent, good, config)


def test_a_deadline_leaves_nothing(agent: AgentProcess, crun: str, tmp_path: Path, left: Callable[[], None]) -> None:
    configs = [container_config(f"c{number}", *COUNTER) for number in range(4)]
    saved(agent, tmp_path / "it", *configs)
    for seconds in (0.02, 0.1, 0.2):
        assert refusal(agent, tmp_path / "it", *configs, timeout=seconds).startswith("DEADLINE_EXCEEDED")
        left()
    restore_pod(agent, tmp_path / "it", *configs)


def test_the_restart_of_the_agent(own_agent: AgentProcess, able: dict[str, str], tmp_path: Path) -> None:
    if able.get("crun") != "able":
        pytest.skip(f"crun cannot make checkpoints here: {able.get('crun')}")
    configs = [container_config(name, *COUNTER) for name in ("first", "second")]
    saved(own_agent, tmp_path / "it", *configs)
    sandbox_id, ids = restore_pod(own_agent, tmp_path / "it", *configs)
    own_agent.client.start(ids["first"])
    shutil.rmtree(tmp_path / "it")  # it is not needed any more
    own_agent.restart()
    assert own_agent.client.status(ids["first"]).state == cri_pb2.CONTAINER_RUNNING
    assert own_agent.client.status(ids["second"]).state == cri_pb2.CONTAINER_CREATED
    own_agent.client.start(ids["second"])
    for container_id in ids.values():
        wait_for_lines(own_agent, container_id, 3)
    own_agent.client.stop_sandbox(sandbox_id)
    own_agent.client.remove_sandbox(sandbox_id)
    wait_for(lambda: own_agent.client.findings() == [], what="no difference between store and node")
