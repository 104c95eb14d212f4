"""``podkeel restore-pod``."""

from __future__ import annotations

import argparse
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cli.checkpoints.volumes import read_volume
from cli.client import Client
from cli.connect import connect
from cli.images.images import find_image, pull_image
from cli.manifest import pod_folder
from cli.manifest.manifest import MASKED_PATHS, READONLY_PATHS, pod_labels
from cli.pods import remove_pod
from host import untrusted_json
from host.errors import InvalidArgumentError
from host.untrusted_json import JsonError
from proto.runtime.v1 import cri_pb2

_DOCUMENT = "pod.json"
_MAX_DOCUMENT_BYTES = 16 << 20
_MAX_VALUES = 500_000


class _Pod(msgspec.Struct, rename="camel"):
    name: str = ""
    namespace: str = ""
    hostname: str = ""


class _Container(msgspec.Struct, rename="camel"):
    name: str
    image_id: str
    image: str = ""
    command: list[str] = []
    args: list[str] = []
    working_dir: str = ""
    envs: dict[str, str] = {}
    stdin: bool = False
    stdin_once: bool = False
    shares_pids: bool = False


class _Document(msgspec.Struct, rename="camel"):
    containers: list[_Container]
    handler: str = ""
    pod: _Pod = msgspec.field(default_factory=_Pod)


@dataclass(frozen=True, slots=True)
class _Volume:
    """A mount of one container, or of all if ``container`` is empty."""

    container: str
    mount: cri_pb2.Mount


def restore_pod(options: argparse.Namespace) -> None:
    """Make a pod from a folder of CheckpointPod, have its containers continue, and print its id.

    If a step fails, the pod is removed before the error is raised. Raises InvalidArgumentError and what the agent says.
    """
    folder = Path(options.folder).absolute()
    document = _read(folder)
    volumes = [_volume(text, document) for text in options.volume]
    config = _sandbox(document, options)
    configs = [_config(each, volumes, unmasked=options.unmasked) for each in document.containers]
    with connect(options) as client:
        for each in document.containers:
            if find_image(client, each.image_id) is None:
                pull_image(client, each.image, sandbox_config=config)
        Path(config.log_directory).mkdir(parents=True, exist_ok=True)
        made = ""
        try:
            made = _restore(client, folder, config, configs, options.runtime_handler or document.handler)
        finally:
            if not made:
                pod_folder.remove(options.pod_dir, config.metadata)
    print(made)


def _read(folder: Path) -> _Document:
    path = folder / _DOCUMENT
    try:
        content = untrusted_json.read_file(path, _MAX_DOCUMENT_BYTES)
        return untrusted_json.decode(content, _Document, max_bytes=_MAX_DOCUMENT_BYTES, max_values=_MAX_VALUES)
    except OSError as error:
        raise InvalidArgumentError(f"{folder} holds no checkpoint of a pod: {path}: {error.strerror}") from error
    except JsonError as error:
        raise InvalidArgumentError(f"{path} cannot be read: {error}") from error


def _volume(text: str, document: _Document) -> _Volume:
    name, separator, rest = text.partition("=")
    if text.startswith("/") or not separator:
        return _Volume("", read_volume(text))
    if name not in {each.name for each in document.containers}:
        raise InvalidArgumentError(f"--volume {text}: the checkpoint has no container {name!r}")
    return _Volume(name, read_volume(rest))


def _sandbox(document: _Document, options: argparse.Namespace) -> cri_pb2.PodSandboxConfig:
    saved = document.pod
    metadata = cri_pb2.PodSandboxMetadata(
        name=options.name or saved.name, namespace=saved.namespace, uid=str(uuid.uuid4())
    )
    config = cri_pb2.PodSandboxConfig(metadata=metadata, hostname=saved.hostname, labels=pod_labels(metadata))
    config.log_directory = str(pod_folder.path(options.pod_dir, metadata).absolute() / "logs")
    shared = any(each.shares_pids for each in document.containers)
    config.linux.security_context.namespace_options.pid = cri_pb2.POD if shared else cri_pb2.CONTAINER
    return config


def _config(saved: _Container, volumes: Sequence[_Volume], *, unmasked: bool) -> cri_pb2.ContainerConfig:
    config = cri_pb2.ContainerConfig(
        metadata=cri_pb2.ContainerMetadata(name=saved.name),
        image=cri_pb2.ImageSpec(image=saved.image_id, user_specified_image=saved.image),
        command=saved.command,
        args=saved.args,
        working_dir=saved.working_dir,
        envs=[cri_pb2.KeyValue(key=key, value=value.encode()) for key, value in saved.envs.items()],
        stdin=saved.stdin,
        stdin_once=saved.stdin_once,
        log_path=f"{saved.name}-restored.log",
        mounts=[volume.mount for volume in volumes if volume.container in ("", saved.name)],
    )
    context = config.linux.security_context
    context.namespace_options.pid = cri_pb2.POD if saved.shares_pids else cri_pb2.CONTAINER
    if not unmasked:
        context.masked_paths.extend(MASKED_PATHS)
        context.readonly_paths.extend(READONLY_PATHS)
    return config


def _restore(
    client: Client,
    folder: Path,
    config: cri_pb2.PodSandboxConfig,
    configs: Sequence[cri_pb2.ContainerConfig],
    handler: str,
) -> str:
    request = cri_pb2.RestorePodRequest(
        checkpoint_path=str(folder), config=config, runtime_handler=handler, container_configs=configs
    )
    what = f"restore pod {config.metadata.name!r}"
    answer = client.call(request, cri_pb2.RestorePodResponse, what, timeout=None)
    try:
        for each in answer.restored_containers:
            start = cri_pb2.StartContainerRequest(container_id=each.container_id)
            client.call(start, cri_pb2.StartContainerResponse, f"restore container {each.name!r}", timeout=None)
    except BaseException:
        remove_pod(client, cri_pb2.PodSandbox(id=answer.pod_sandbox_id, metadata=config.metadata))
        raise
    return answer.pod_sandbox_id
