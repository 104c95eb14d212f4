"""``podkeel checkpoint``, ``podkeel restore`` and ``podkeel image from-checkpoint``."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

from cli.checkpoints.volumes import read_volume
from cli.client import Client
from cli.connect import connect
from cli.lookup import find_container, find_pod
from cli.manifest.manifest import MASKED_PATHS, READONLY_PATHS
from host.errors import NotFoundError
from proto.podkeel.v1 import agent_pb2
from proto.runtime.v1 import cri_pb2


def checkpoint(options: argparse.Namespace) -> None:
    """Write a running container to an archive on the node, and print its path."""
    location = str(Path(options.archive).absolute())
    with connect(options) as client:
        container = find_container(client, options.container)
        request = cri_pb2.CheckpointContainerRequest(
            container_id=container.id, location=location, timeout=options.timeout
        )
        what = f"checkpoint container {options.container!r}"
        client.call(request, cri_pb2.CheckpointContainerResponse, what, timeout=None)
    print(location)


def make_image(options: argparse.Namespace) -> None:
    """Make an image of a checkpoint archive; prints its name in full and its id."""
    with connect(options) as client:
        answer = _image_of(client, options.archive, options.name)
    print(f"{answer.name}  {answer.id}")


def restore(options: argparse.Namespace) -> None:
    """Restore a container from an archive into a pod, and print its id.

    Raises InvalidArgumentError and NotFoundError.
    """
    mounts = [read_volume(text) for text in options.volume]
    path = Path(options.archive).absolute()
    with connect(options) as client:
        pod = find_pod(client, options.pod)
        status = client.call(
            cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=pod.id), cri_pb2.PodSandboxStatusResponse, "look at the pod"
        ).status
        image = _image_of(client, options.archive, f"localhost/checkpoint:{_mark(path)}")
        name = options.name or image.container
        config = cri_pb2.ContainerConfig(
            metadata=cri_pb2.ContainerMetadata(name=name),
            image=cri_pb2.ImageSpec(image=image.name),
            log_path=f"{name}-restored.log",
            mounts=mounts,
        )
        context = config.linux.security_context
        context.namespace_options.CopyFrom(status.linux.namespaces.options)
        if not options.unmasked:
            context.masked_paths.extend(MASKED_PATHS)
            context.readonly_paths.extend(READONLY_PATHS)
        request = cri_pb2.CreateContainerRequest(pod_sandbox_id=pod.id, config=config)
        made = client.call(request, cri_pb2.CreateContainerResponse, f"create container {name!r}", timeout=None)
        start = cri_pb2.StartContainerRequest(container_id=made.container_id)
        client.call(start, cri_pb2.StartContainerResponse, f"restore container {name!r}", timeout=None)
    print(made.container_id)


def _mark(path: Path) -> str:
    """A name for the file's present content: the same content gets the same image name."""
    try:
        changed = path.stat().st_mtime_ns
    except OSError as error:
        raise NotFoundError(f"checkpoint archive {path}: {error.strerror}") from error
    return hashlib.sha256(f"{path} {changed}".encode()).hexdigest()[:16]


def _image_of(client: Client, archive: str, name: str) -> agent_pb2.ImageFromCheckpointResponse:
    request = agent_pb2.ImageFromCheckpointRequest(path=str(Path(archive).absolute()), name=name)
    what = f"make an image of {archive}"
    return client.call(request, agent_pb2.ImageFromCheckpointResponse, what, timeout=None)
