"""The attributes of a call's span: its pod, container and image, by the names of the semantic conventions."""

from __future__ import annotations

from typing import Any, TypeVar

from cri.methods import Call
from host.errors import InvalidArgumentError
from proto.runtime.v1 import cri_pb2
from runtime.state.container import Container
from runtime.state.sandbox import Sandbox
from runtime.state.state import State
from runtime.state.truncindex import Registry

T = TypeVar("T", Sandbox, Container)


def attributes_of(state: State, call: Call) -> dict[str, str]:
    """The attributes of the objects of a call, from request, response and the node; empty for lists."""
    found: dict[str, str] = {}
    request = call.request
    for config in (_part(request, "config"), _part(request, "sandbox_config")):
        if isinstance(config, cri_pb2.PodSandboxConfig):
            found |= _pod(config.metadata)
        elif isinstance(config, cri_pb2.ContainerConfig):
            found["k8s.container.name"] = config.metadata.name
            found["container.image.name"] = config.image.user_specified_image or config.image.image
    image = _part(request, "image")
    if isinstance(image, cri_pb2.ImageSpec):
        found["container.image.name"] = image.user_specified_image or image.image
    for message in (request, call.response):
        sandbox_id, container_id = _part(message, "pod_sandbox_id"), _part(message, "container_id")
        if sandbox_id:
            found |= _sandbox(_found(state.sandboxes, sandbox_id), sandbox_id)
        if container_id:
            found |= _container(_found(state.containers, container_id), container_id)
    return {key: value for key, value in found.items() if value}


def _part(message: Any, name: str) -> Any:
    """A field of that name, if the message has such a field and it is set."""
    return getattr(message, name, None)


def _found(known: Registry[T], object_id: str) -> T | None:
    try:
        return known.find(object_id)
    except InvalidArgumentError:  # ambiguous: the call itself returns this error
        return None


def _sandbox(sandbox: Sandbox | None, sandbox_id: str) -> dict[str, str]:
    if sandbox is None:
        return {"podkeel.sandbox.id": sandbox_id}
    return {"podkeel.sandbox.id": sandbox.id, **_pod(sandbox.config.metadata)}


def _container(container: Container | None, container_id: str) -> dict[str, str]:
    if container is None:
        return {"container.id": container_id}
    return {
        "container.id": container.id,
        "k8s.container.name": container.config.metadata.name,
        "container.image.name": container.config.image.user_specified_image or container.config.image.image,
        **_sandbox(container.sandbox, container.sandbox.id),
    }


def _pod(metadata: cri_pb2.PodSandboxMetadata) -> dict[str, str]:
    return {
        "k8s.namespace.name": metadata.namespace,
        "k8s.pod.name": metadata.name,
        "k8s.pod.uid": metadata.uid,
    }
