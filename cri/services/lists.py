"""Answers list calls from memory: each item is encoded once, and an answer joins the encoded items."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import TypeVar

from google.protobuf.message import Message

from host.errors import InvalidArgumentError
from images.store import ImageStore
from proto.runtime.v1 import cri_pb2
from proto.wire import encode_item
from runtime.state import status
from runtime.state.container import Container
from runtime.state.sandbox import Sandbox
from runtime.state.state import State

S = TypeVar("S", Sandbox, Container)


class Lists:
    """The items of ListPodSandbox and ListContainers.

    ``_renamed`` are the containers whose image had lost its name to another one at ``_revision`` of the images.
    """

    def __init__(self, state: State, images: ImageStore) -> None:
        self._state = state
        self._images = images
        self._renamed: frozenset[str] = frozenset()
        self._revision = -1

    def sandboxes(self, wanted: cri_pb2.PodSandboxFilter) -> Iterator[bytes]:
        """Encoded items of the sandboxes that match; an unknown or ambiguous id matches none."""
        for sandbox in self._state.visible_sandboxes():
            if wanted.id and not sandbox.id.startswith(wanted.id):
                continue
            if wanted.HasField("state") and status.sandbox_state(sandbox) != wanted.state.state:
                continue
            if matches(wanted.label_selector, sandbox.config.labels):
                yield _item(sandbox, status.sandbox_item)

    def containers(self, wanted: cri_pb2.ContainerFilter) -> Iterator[bytes]:
        """Encoded items of the containers that match; an unknown or ambiguous id matches none."""
        self._follow_image_names()
        for container in self._state.visible_containers():
            if wanted.id and not container.id.startswith(wanted.id):
                continue
            if wanted.pod_sandbox_id and not container.sandbox.id.startswith(wanted.pod_sandbox_id):
                continue
            if wanted.HasField("state") and status.container_state(container) != wanted.state.state:
                continue
            if matches(wanted.label_selector, container.config.labels):
                yield _item(container, self._container_item)

    def _follow_image_names(self) -> None:
        """Drop the encoded items of containers whose image name has moved to another image, or back, since."""
        if self._revision == self._images.revision:
            return
        renamed = frozenset(container.id for container in self._state.containers if self._lost_its_name(container))
        for container in self._state.containers:
            if (container.id in renamed) != (container.id in self._renamed):
                container.list_item = None
        self._renamed = renamed
        self._revision = self._images.revision

    def _lost_its_name(self, container: Container) -> bool:
        """Whether the requested name belongs to another image now."""
        asked = container.config.image
        with suppress(InvalidArgumentError):  # the name that a client displays need not be a reference
            named = self._images.find(asked.user_specified_image or asked.image)
            return named is not None and named.id != container.record.image_id
        return False

    def _container_item(self, container: Container) -> cri_pb2.Container:
        """The container's item; it has the image's id if the name belongs to another image now.

        ``crictl rmi --prune`` removes every image that no container names here.
        """
        item = status.container_item(container)
        if self._lost_its_name(container):
            item.image.image = item.image_id
        return item


def matches(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether ``labels`` hold every pair of ``selector``."""
    return all(labels.get(key) == value for key, value in selector.items())


def _item(subject: S, build: Callable[[S], Message]) -> bytes:
    if subject.list_item is None:
        subject.list_item = encode_item(build(subject))
    return subject.list_item
