"""Messages of pods and containers for plugins, kept for the next event of each object."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from host.concurrency.threads import in_thread
from proto.nri.v1alpha1 import nri_pb2
from runtime.cgroups.tree import CgroupTree
from runtime.nri import messages
from runtime.specgen import config as oci
from runtime.specgen.draft import Draft
from runtime.state.container import Container
from runtime.state.sandbox import Sandbox

_log = logging.getLogger("podkeel.nri")
_decode_spec = msgspec.json.Decoder(oci.Spec).decode


class OfContainer(Protocol):
    """The request for an event of a container."""

    @property
    def pod(self) -> nri_pb2.PodSandbox:
        """The message of the pod, to be filled in."""

    @property
    def container(self) -> nri_pb2.Container:
        """The message of the container, to be filled in."""


class Views:
    """Makes the messages of pods and containers.

    The message of a container with the changes of plugins is kept encoded, so that its events need not read the spec
    from the disk. The draft of a container that no plugin adjusts is kept until it is created (``keep_draft``), for
    plugins that connect meanwhile.
    """

    def __init__(self, cgroups: CgroupTree) -> None:
        self._cgroups = cgroups
        self._seen: dict[str, bytes] = {}
        self._pods: dict[str, tuple[object, nri_pb2.PodSandbox]] = {}
        self._drafts: dict[str, bytes] = {}

    def pod(self, sandbox: Sandbox) -> nri_pb2.PodSandbox:
        """The message of the pod as it is now. The caller must not change it: it is kept for the pod's next event."""
        record = sandbox.record
        made_of = (record.addresses, record.pid_holder, record.overhead, record.resources)
        kept = self._pods.get(sandbox.id)
        if kept is None or kept[0] != made_of:
            kept = self._pods[sandbox.id] = (made_of, self._new_pod(sandbox))
        return kept[1]

    def _new_pod(self, sandbox: Sandbox) -> nri_pb2.PodSandbox:
        cgroup = self._cgroups.parent_path(sandbox.record.cgroup_parent)
        return messages.pod(sandbox, cgroup)

    def keep(self, container: nri_pb2.Container) -> None:
        """Keep the message of a container that is being created."""
        self._seen[container.id] = container.SerializeToString()

    def keep_draft(self, container: Container, draft: Draft) -> None:
        """Keep the draft of a container that no plugin adjusts. Any thread may call it."""
        self._drafts[container.id] = oci.encode(draft.spec)

    def drop_draft(self, container: Container) -> None:
        """Drop the draft: the container has its spec on the disk, or a plugin will adjust it."""
        self._drafts.pop(container.id, None)

    async def fill(
        self, request: OfContainer, container: Container, state: nri_pb2.ContainerState | None = None
    ) -> None:
        """Put a container and its pod into ``request``, as they are now, or with ``state`` as the container's state."""
        if container.id not in self._seen:
            await in_thread(self._make_message, container)
        request.pod.CopyFrom(self.pod(container.sandbox))
        self._put(container, request.container, state)

    def _make_message(self, container: Container) -> None:
        """Make the message of a container from its spec. Blocks."""
        try:
            written = container.folder.spec
            spec = _decode_spec(self._drafts.get(container.id) or written.read_bytes())
        except (OSError, msgspec.MsgspecError) as error:
            _log.warning("nri: %s: spec: cannot be read, so plugins get less about it: %s", container.title, error)
            spec = None
        self._seen[container.id] = messages.container(container, spec).SerializeToString()

    def _put(
        self, container: Container, message: nri_pb2.Container, state: nri_pb2.ContainerState | None = None
    ) -> nri_pb2.Container:
        message.MergeFromString(self._seen[container.id])
        messages.set_status(message, container, state)
        return message

    async def inventory(
        self,
        sandboxes: Sequence[Sandbox],
        containers: Sequence[Container],
        states: Mapping[str, nri_pb2.ContainerState],
    ) -> list[nri_pb2.SynchronizeRequest]:
        """These pods and containers, in one message or more; ``states`` has states that differ from the record's."""

        def build() -> list[nri_pb2.SynchronizeRequest]:
            for container in containers:
                if container.id not in self._seen:
                    self._make_message(container)
            pods = [self._new_pod(sandbox) for sandbox in sandboxes]
            listed = [self._put(one, nri_pb2.Container(), states.get(one.id)) for one in containers]
            return list(messages.split(pods, listed))

        return await in_thread(build)

    def forget(self, object_id: str) -> None:
        """Forget an object that is removed."""
        self._seen.pop(object_id, None)
        self._pods.pop(object_id, None)
        self._drafts.pop(object_id, None)
