"""CreateContainer with the path of an archive as image, from the folders that the configuration allows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.checkpoint.test_restore import TICKS, create_from
from tests.support.agent import AgentProcess, running_agent, wait_for
from tests.support.checkpoints import abilities, checkpoint, made_up, run_with, wait_for_lines
from tests.support.pods import remove_all_pods, wait_for_log


@pytest.fixture(scope="module")
def allowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("allowed")


@pytest.fixture(scope="module")
def module_agent(tmp_path_factory: pytest.TempPathFactory, busybox: Path, allowed: Path) -> Iterator[AgentProcess]:
    options = f'\n[checkpoint]\narchive_dirs = ["/missing", "{allowed}"]\n[images]\nmax_layer_bytes = 100_000_000'
    with running_agent(tmp_path_factory.mktemp("agent"), busybox, options=options) as agent:
        yield agent


@pytest.fixture
def its_agent(module_agent: AgentProcess) -> Iterator[AgentProcess]:
    yield module_agent
    remove_all_pods(module_agent.client)


def refused(agent: AgentProcess, path: Path | str, code: grpc.StatusCode, words: str) -> None:
    with pytest.raises(grpc.RpcError) as failure:
        create_from(agent, str(path))
    assert failure.value.code() is code, failure.value.details()
    assert words in failure.value.details()


def test_a_container_is_restored_from_an_archive(its_agent: AgentProcess, allowed: Path) -> None:
    why = abilities(its_agent).get("crun", "it does not work here")
    if why != "able":
        pytest.skip(f"crun cannot make checkpoints here: {why}")
    script = f"mkdir /made; echo new > /made/file; rm /etc/passwd; {TICKS}"
    _, first = run_with(its_agent, "crun", "sh", "-c", script)
    wait_for_log(its_agent.client, first)
    wait_for_lines(its_agent, first, 3)
    archive = allowed / "checkpoint-pod_default-main-2026-01-01T00:00:00Z.tar"
    checkpoint(its_agent, first, archive)
    before = archive.read_bytes()
    second = create_from(its_agent, str(archive))
    status = its_agent.client.status(second)
    assert status.image_ref == its_agent.client.status(first).image_ref
    assert status.image.image == str(archive)
    archive.rename(allowed / "elsewhere.tar")  # it is not needed any more
    its_agent.client.start(second)
    assert int(wait_for_lines(its_agent, second, 3)[0]) > 1
    assert its_agent.client.output(second, "cat", "/made/file") == "new\n"
    assert its_agent.client.exec(second, "test", "-e", "/etc/passwd").exit_code == 1
    folder = its_agent.data / "containers" / second
    images = {"archive", "checkpoint"}
    wait_for(
        lambda: not {entry.name for entry in folder.iterdir()} & images, what="the images gone, as they are in memory"
    )
    assert (allowed / "elsewhere.tar").read_bytes() == before
    third = create_from(its_agent, str(allowed / "elsewhere.tar"))
    its_agent.client.remove(third)
    assert not (its_agent.data / "containers" / third).exists()


def test_only_from_the_folders_that_are_allowed(its_agent: AgentProcess, allowed: Path, tmp_path: Path) -> None:
    outside = made_up(tmp_path)
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    refused(its_agent, outside, invalid, "checkpoint.archive_dirs")
    refused(its_agent, f"{allowed}/../{outside.parent.name}/{outside.name}", invalid, "checkpoint.archive_dirs")
    refused(its_agent, f"{allowed}-not/it.tar", invalid, "checkpoint.archive_dirs")
    (allowed / "link.tar").symlink_to(outside)
    refused(its_agent, allowed / "link.tar", invalid, "cannot be opened")
    (allowed / "folder").symlink_to(tmp_path)
    refused(its_agent, allowed / "folder" / outside.name, invalid, "cannot be opened")
    refused(its_agent, allowed / "missing.tar", grpc.StatusCode.NOT_FOUND, "does not exist")
    refused(its_agent, "/missing/it.tar", grpc.StatusCode.NOT_FOUND, "does not exist")
    refused(its_agent, allowed, invalid, "not a regular file")


def test_only_files_that_root_alone_writes(its_agent: AgentProcess, allowed: Path) -> None:
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    archive = made_up(allowed)
    archive.chmod(0o622)
    refused(its_agent, archive, invalid, "can be written by others than root")
    archive.chmod(0o600)
    os.chown(archive, 1000, 0)
    refused(its_agent, archive, invalid, "can be written by others than root")
    os.chown(archive, 0, 0)
    archive.write_bytes(archive.read_bytes() + b"x")
    refused(its_agent, archive, invalid, "not a plain tar file")
    os.truncate(archive, 200 << 20)
    refused(its_agent, archive, grpc.StatusCode.RESOURCE_EXHAUSTED, "images.max_layer_bytes")
    archive.unlink()
    os.mkfifo(archive)
    refused(its_agent, archive, invalid, "not a regular file")
    archive.unlink()
    assert its_agent.client.findings() == []


def test_archives_are_checked_as_others_are(its_agent: AgentProcess, allowed: Path) -> None:
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    refused(its_agent, made_up(allowed, {"../../etc/evil": b"it"}), invalid, "a name that leaves the archive")
    refused(its_agent, made_up(allowed, {"checkpoint/inventory.img": None}), invalid, "not a checkpoint of a container")
    refused(its_agent, made_up(allowed, machine=5), invalid, "was made on s390x")
    assert its_agent.client.call("ListContainers", cri_pb2.ListContainersRequest()).containers == []
