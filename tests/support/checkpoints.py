"""Makes checkpoints for tests, and reads their archives."""

from __future__ import annotations

import io
import json
import os
import socket
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from proto.podkeel.v1 import agent_pb2
from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess, wait_for
from tests.support.pods import container_config, log_lines, sandbox_config

# Counts in memory, so that a restored container continues counting. It has a child process.
COUNTER = (
    "sh",
    "-c",
    "mkdir -p /made; echo new > /made/file; rm /etc/passwd; rm -r /home; mkdir /home; echo it > /home/it;"
    " (while :; do sleep 1; done) & i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done",
)


def abilities(agent: AgentProcess) -> dict[str, str]:
    """What the agent reports about checkpoints for each runtime handler: "able", or the reason why not."""
    answer = agent.client.call("Status", cri_pb2.StatusRequest(verbose=True))
    report = json.loads(answer.info["podkeel"])["checkpoint"]
    handlers: dict[str, str] = report["handlers"]
    return handlers


def why_no_sockets(agent: AgentProcess) -> str:
    """Why TCP and UDP sockets cannot be checkpointed on this machine; empty if they can."""
    answer = agent.client.call("Status", cri_pb2.StatusRequest(verbose=True))
    version = json.loads(answer.info["podkeel"])["checkpoint"]["criu"]
    with socket.socket() as tried:
        try:
            tried.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED)
        except OSError:
            if tuple(map(int, version.split(".")[:2])) < (4, 2):
                return f"CRIU {version} cannot save a TCP socket of Linux 6.16 or later: it takes CRIU 4.2"
    return ""


def run_with(agent: AgentProcess, handler: str, *command: str, **fields: Any) -> tuple[str, str]:
    """Run a new pod of a runtime handler with one container. Returns their ids."""
    sandbox = sandbox_config(agent)
    request = cri_pb2.RunPodSandboxRequest(config=sandbox, runtime_handler=handler)
    sandbox_id = agent.client.call("RunPodSandbox", request).pod_sandbox_id
    container_id = agent.client.create(sandbox_id, container_config("main", *command, **fields), sandbox)
    agent.client.start(container_id)
    return sandbox_id, container_id


def checkpoint(agent: AgentProcess, container_id: str, location: Path, timeout: int = 0) -> None:
    """Call CheckpointContainer."""
    request = cri_pb2.CheckpointContainerRequest(container_id=container_id, location=str(location), timeout=timeout)
    agent.client.call("CheckpointContainer", request)


def lines_of(agent: AgentProcess, container_id: str) -> list[str]:
    """The log lines of a container."""
    path = Path(agent.client.status(container_id).log_path)
    return log_lines(path) if path.exists() else []


def wait_for_lines(agent: AgentProcess, container_id: str, more: int = 1) -> list[str]:
    """Wait until a container has logged that many more lines. Returns all lines."""
    before = len(lines_of(agent, container_id))
    wait_for(lambda: len(lines_of(agent, container_id)) >= before + more, what=f"{more} more log lines")
    return lines_of(agent, container_id)


def memory_of(agent: AgentProcess, container_id: str) -> int:
    """The memory usage of a container in bytes."""
    request = cri_pb2.ContainerStatsRequest(container_id=container_id)
    return int(agent.client.call("ContainerStats", request).stats.memory.usage_bytes.value)


def members(archive: Path) -> dict[str, tarfile.TarInfo]:
    """The members of an archive by name."""
    with tarfile.open(archive) as file:
        return {member.name: member for member in file}


def content(archive: Path, name: str) -> bytes:
    """The content of a member of an archive."""
    with tarfile.open(archive) as file:
        member = file.extractfile(name)
        assert member is not None
        return member.read()


def document(archive: Path, name: str) -> Any:
    """A decoded JSON member of an archive."""
    return json.loads(content(archive, name))


def made_up(folder: Path, changes: dict[str, bytes | tarfile.TarInfo | None] | None = None, machine: int = 0) -> Path:
    """Write an archive like that of a checkpoint, with CRIU images from which no process can be restored.

    ``changes`` replace, add or remove members. ``machine`` is CRIU's number, by default this machine's.
    """
    own = {"x86_64": 1, "aarch64": 3, "ppc64le": 4, "s390x": 5}[os.uname().machine]
    core = b"\x19\x43\x56\x54\x47\x38\x05\x55" + (2).to_bytes(4, "little") + bytes((8, machine or own))
    config = {"id": "0" * 64, "name": "main", "rootfsImageName": "docker.io/library/busybox:latest", "runtime": "crun"}
    found: dict[str, bytes | tarfile.TarInfo | None] = {
        "config.dump": json.dumps(config).encode(),
        "spec.dump": b"{}",
        "checkpoint/inventory.img": b"x" * 86,
        "checkpoint/pstree.img": b"x" * 30,
        "checkpoint/core-1.img": core,
        "checkpoint/pages-1.img": b"x" * 8192,
        "rootfs-diff.tar": bytes(1024),
        **(changes or {}),
    }
    path = folder / "made-up.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name, value in found.items():
            if isinstance(value, bytes):
                member = tarfile.TarInfo(name)
                member.size = len(value)
                archive.addfile(member, io.BytesIO(value))
            elif value is not None:
                archive.addfile(value, io.BytesIO(bytes(value.size)))
    return path


def files_of(agent: AgentProcess, folder: Path) -> list[Path]:
    """The files of checkpoints in ``folder``, the destination, and in the agent's folders."""
    work = agent.data / "checkpoints"
    return [*folder.iterdir(), *(work.iterdir() if work.exists() else ())]


def nothing_is_left(agent: AgentProcess, folder: Path) -> None:
    """Assert that a failed checkpoint left no file."""
    assert files_of(agent, folder) == []


def wait_for_nothing_left(agent: AgentProcess, folder: Path) -> None:
    """Wait until a checkpoint whose client left has left no file. The client gets its error before the clean-up."""
    wait_for(lambda: files_of(agent, folder) == [], what="nothing left of the checkpoint")


def image_names(agent: AgentProcess) -> set[str]:
    """The names of all images of the agent, and the ids of images without a name."""
    images = agent.client.call("ListImages", cri_pb2.ListImagesRequest()).images
    return {name for image in images for name in image.repo_tags or [image.id]}


@pytest.fixture(autouse=True)
def no_new_images(shared_agent: AgentProcess) -> Iterator[None]:
    """Remove the images that a test makes in the shared agent, and their containers first."""
    before = image_names(shared_agent)
    yield
    for name in image_names(shared_agent) - before:
        request = cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image=name))
        shared_agent.client.call("RemoveImage", request)


CHECKPOINT_IMAGE = "example.org/restored:1"


def image_of(agent: AgentProcess, archive: Path, name: str = CHECKPOINT_IMAGE) -> str:
    """Make an image of an archive. Returns its name."""
    agent.client.call("ImageFromCheckpoint", agent_pb2.ImageFromCheckpointRequest(path=str(archive), name=name))
    return name


def checkpoint_pod(agent: AgentProcess, sandbox_id: str, place: Path, ids: Sequence[str], **options: str) -> None:
    """Call CheckpointPod."""
    request = cri_pb2.CheckpointPodRequest(
        pod_sandbox_id=sandbox_id, output_path=str(place), container_ids=ids, options=options
    )
    agent.client.call("CheckpointPod", request)


def restore_pod(
    agent: AgentProcess,
    place: Path | str,
    *configs: cri_pb2.ContainerConfig,
    sandbox: cri_pb2.PodSandboxConfig | None = None,
    handler: str = "crun",
    options: Mapping[str, str] | None = None,
    timeout: float = 60.0,
) -> tuple[str, dict[str, str]]:
    """Call RestorePod. Returns the id of the pod, and the ids of its containers by name."""
    request = cri_pb2.RestorePodRequest(
        checkpoint_path=str(place),
        config=sandbox or sandbox_config(agent),
        runtime_handler=handler,
        options=options,
        container_configs=configs,
    )
    answer = agent.client.call("RestorePod", request, timeout=timeout)
    return answer.pod_sandbox_id, {each.name: each.container_id for each in answer.restored_containers}


def run_pod(
    agent: AgentProcess, *configs: cri_pb2.ContainerConfig, sandbox: cri_pb2.PodSandboxConfig | None = None
) -> tuple[str, list[str]]:
    """Run a new pod with crun and started containers. Returns their ids."""
    sandbox = sandbox or sandbox_config(agent)
    request = cri_pb2.RunPodSandboxRequest(config=sandbox, runtime_handler="crun")
    sandbox_id = agent.client.call("RunPodSandbox", request).pod_sandbox_id
    ids = [agent.client.create(sandbox_id, config, sandbox) for config in configs]
    for container_id in ids:
        agent.client.start(container_id)
    return sandbox_id, ids
