"""Messages of pods and containers for plugins, kept encoded for the next event of each object."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import msgspec

from host.concurrency.threads import in_thread
from proto.nri.v1alpha1 import nri_pb2
from runtime.cgroups.tree import CgroupTree
from runtime.nri import messages
from runtime.nri.plugins.encoding import EventRequest, field
from runtime.specgen import config as oci
from runtime.specgen.draft import Draft
from runtime.state.container import Container, ContainerState
from runtime.state.sandbox import Sandbox

_log = logging.getLogger("podkeel.nri")
_decode_spec = msgspec.json.Decoder(oci.Spec).decode


_LINUX = nri_pb2.Container.DESCRIPTOR.fields_by_name["linux"].number
_RESOURCES = nri_pb2.LinuxContainer.DESCRIPTOR.fields_by_name["resources"].number


class _Seen:
    """The message of a container with the changes of plugins, in encoded parts, as only its resources change later.

    ``linux`` is None where the container's spec is gone.
    """

    __slots__ = ("_current", "_left", "_of", "linux", "rest")

    def __init__(self, container: nri_pb2.Container) -> None:
        rest = nri_pb2.Container()
        rest.CopyFrom(container)
        for name in messages.STATUS:
            rest.ClearField(name)
        self.linux: bytes | None = None
        self._left = self._current = b""
        if rest.HasField("linux"):
            self._left = self._current = rest.linux.resources.SerializeToString()
            rest.linux.ClearField("resources")
            self.linux = rest.linux.SerializeToString()
            rest.ClearField("linux")
        self.rest = rest.SerializeToString()
        self._of: tuple[bytes, str | None] | None = None

    def resources(self, container: Container) -> bytes:
        """The resources that the container has now; until it is created, those that plugins set."""
        record = container.record
        if record.state is ContainerState.MAKING:
            return self._left
        of = record.resources, record.extra_limits.block_io_class
        if self._of != of:
            message = nri_pb2.LinuxResources.FromString(self._left)
            messages.set_current(message, *of)
            self._of, self._current = of, message.SerializeToString()
        return self._current


class Views:
    """Makes the messages of pods and containers.

    The message of a container with the changes of plugins is kept encoded, so that its events need not read the spec
    from the disk. The draft of a container that no plugin adjusts is kept until it is created (``keep_draft``), for
    plugins that connect meanwhile.
    """

    def __init__(self, cgroups: CgroupTree) -> None:
        self._cgroups = cgroups
        self._seen: dict[str, _Seen] = {}
        self._pods: dict[str, tuple[object, bytes]] = {}
        self._drafts: dict[str, bytes] = {}

    def pod(self, sandbox: Sandbox) -> bytes:
        """The message of the pod as it is now, encoded."""
        record = sandbox.record
        made_of = (record.addresses, record.pid_holder, record.overhead, record.resources)
        kept = self._pods.get(sandbox.id)
        if kept is None or kept[0] != made_of:
            kept = self._pods[sandbox.id] = (made_of, self._new_pod(sandbox).SerializeToString())
        return kept[1]

    def pod_message(self, sandbox: Sandbox) -> nri_pb2.PodSandbox:
        """The message of the pod as it is now."""
        return nri_pb2.PodSandbox.FromString(self.pod(sandbox))

    def _new_pod(self, sandbox: Sandbox) -> nri_pb2.PodSandbox:
        cgroup = self._cgroups.parent_path(sandbox.record.cgroup_parent)
        return messages.pod(sandbox, cgroup)

    def new_container(self, container: Container, draft: Draft) -> nri_pb2.Container:
        """Make and keep the message of a container that is being created. Any thread may call it."""
        message = messages.container(container, draft.spec)
        self.keep(message)
        return message

    def keep(self, container: nri_pb2.Container) -> None:
        """Keep the message of a container that is being created."""
        self._seen[container.id] = _Seen(container)

    def keep_draft(self, container: Container, draft: Draft) -> None:
        """Keep the draft of a container that no plugin adjusts. Any thread may call it."""
        self._drafts[container.id] = oci.encode(draft.spec)

    def drop_draft(self, container: Container) -> None:
        """Drop the draft: the container has its spec on the disk, or a plugin will adjust it."""
        self._drafts.pop(container.id, None)

    async def request(self, container: Container, state: nri_pb2.ContainerState | None = None) -> EventRequest:
        """A container and its pod, as they are now, or with ``state`` as the container's state."""
        if container.id not in self._seen:
            await in_thread(self._make_message, container)
        return EventRequest(self.pod(container.sandbox), self._encoded(container, state))

    def _make_message(self, container: Container) -> None:
        """Make the message of a container from its spec. Blocks."""
        try:
            written = container.folder.spec
            spec = _decode_spec(self._drafts.get(container.id) or written.read_bytes())
        except (OSError, msgspec.MsgspecError) as error:
            _log.warning("nri: %s: spec: cannot be read, so plugins get less about it: %s", container.title, error)
            spec = None
        self._seen[container.id] = _Seen(messages.container(container, spec))

    def _encoded(self, container: Container, state: nri_pb2.ContainerState | None = None) -> bytes:
        seen, linux = self._seen[container.id], b""
        if seen.linux is not None:
            linux = field(_LINUX, seen.linux + field(_RESOURCES, seen.resources(container)))
        return seen.rest + linux + messages.status(container, state).SerializeToString()

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
            listed = [nri_pb2.Container.FromString(self._encoded(one, states.get(one.id))) for one in containers]
            return list(messages.split(pods, listed))

        return await in_thread(build)

    def forget(self, object_id: str) -> None:
        """Forget an object that is removed."""
        self._seen.pop(object_id, None)
        self._pods.pop(object_id, None)
        self._drafts.pop(object_id, None)
