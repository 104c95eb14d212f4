"""``pod.json``: the pod and the containers of a checkpoint.

It is written last, so a folder without it is not a checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from images.oci.platforms import this_machine
from proto.runtime.v1 import cri_pb2
from runtime.checkpoint.documents import rfc3339
from runtime.state.container import Container
from runtime.state.sandbox import Sandbox

DOCUMENT = "pod.json"
CONTAINERS = "containers"
VERSION = 1


class SavedPod(msgspec.Struct, rename="camel"):
    """The pod that was checkpointed."""

    id: str = ""
    name: str = ""
    namespace: str = ""
    uid: str = ""
    attempt: int = 0
    hostname: str = ""


class SavedContainer(msgspec.Struct, rename="camel"):
    """A container of a checkpoint: ``folder`` is its folder in the checkpoint, ``image_id`` the image it was made from.

    The other fields are from its configuration. The configuration of a restore must have the same values.
    """

    name: str
    folder: str
    image_id: str
    id: str = ""
    image: str = ""
    command: list[str] = []
    args: list[str] = []
    working_dir: str = ""
    envs: dict[str, str] = {}
    stdin: bool = False
    stdin_once: bool = False
    shares_pids: bool = False


class PodDocument(msgspec.Struct, rename="camel"):
    """``pod.json``. ``frozen_seconds`` is how long the containers were frozen."""

    version: int
    machine: str
    containers: list[SavedContainer]
    engine: str = "podkeel"
    handler: str = ""
    criu: str = ""
    created: str = ""
    frozen_seconds: float = 0.0
    pod: SavedPod = msgspec.field(default_factory=SavedPod)


def describe(
    sandbox: Sandbox, containers: Sequence[Container], *, frozen_seconds: float, criu: str, folders: Sequence[str]
) -> bytes:
    """Make the document of a checkpoint of these containers, whose folders in it are ``folders``."""
    metadata = sandbox.config.metadata
    document = PodDocument(
        version=VERSION,
        machine=this_machine().architecture,
        containers=[_saved(container, folder) for container, folder in zip(containers, folders, strict=True)],
        handler=sandbox.record.handler,
        criu=criu,
        created=rfc3339(time.time_ns()),
        frozen_seconds=round(frozen_seconds, 6),
        pod=SavedPod(
            id=sandbox.id,
            name=metadata.name,
            namespace=metadata.namespace,
            uid=metadata.uid,
            attempt=metadata.attempt,
            hostname=sandbox.config.hostname,
        ),
    )
    return msgspec.json.format(msgspec.json.encode(document), indent=2)


def _saved(container: Container, folder: str) -> SavedContainer:
    config = container.config
    return SavedContainer(
        name=config.metadata.name,
        folder=folder,
        id=container.id,
        image=config.image.user_specified_image or config.image.image,
        image_id=container.record.image_id,
        command=list(config.command),
        args=list(config.args),
        working_dir=config.working_dir,
        envs=environment(config),
        stdin=config.stdin,
        stdin_once=config.stdin_once,
        shares_pids=shares_pids(config),
    )


def environment(config: cri_pb2.ContainerConfig) -> dict[str, str]:
    """The environment of a configuration as text. Values may have any bytes."""
    return {pair.key: pair.value.decode(errors="backslashreplace") for pair in config.envs}


def shares_pids(config: cri_pb2.ContainerConfig) -> bool:
    """Whether a configuration makes a container use the PID namespace of its pod."""
    return config.linux.security_context.namespace_options.pid == cri_pb2.POD
