"""A pod sandbox: its configuration, its record, and its state."""

from __future__ import annotations

import asyncio
import enum
from dataclasses import dataclass, field

import msgspec

from host.processes import ProcessName
from host.stages import Operation
from proto.runtime.v1 import cri_pb2
from runtime.layout import SandboxFolder

_OPERATIONS_KEPT = 8


class SandboxState(enum.StrEnum):
    """Clients do not see ``making`` and ``removing``. The next start undoes the former and finishes the latter."""

    MAKING = "making"
    READY = "ready"
    NOT_READY = "not_ready"
    REMOVING = "removing"


class SandboxRecord(msgspec.Struct):
    """The store's data about a sandbox besides its configuration. Times are in nanoseconds since the epoch.

    ``handler`` is the runtime handler in use, ``requested_handler`` the name in the request (empty for the default).
    ``torn_down``: network and namespaces are released. ``oom_kills`` are the kills in its cgroup that are attributed to
    ended containers or to the time before it. ``selinux_level`` is the pod's own on a node with SELinux. ``restoring``
    is the call of RestorePod that creates it, until that is complete: a start before that removes it.
    """

    state: SandboxState
    created_at: int
    handler: str
    requested_handler: str
    boot_id: str
    cgroup_parent: str = ""
    owns_cgroup_parent: bool = False
    addresses: tuple[str, ...] = ()
    pid_holder: ProcessName | None = None
    torn_down: bool = False
    resources: bytes = b""
    overhead: bytes = b""
    oom_kills: int = 0
    selinux_level: str = ""
    restoring: str = ""


@dataclass(slots=True)
class Sandbox:
    """A sandbox in memory; ``folder`` has its pinned namespaces and its files.

    ``lock`` serialises its changes. While it is ``closing`` it accepts no new containers. ``port_forwards`` are tasks
    with sockets in its network, which would keep that alive. They are cancelled before it is torn down. ``checkpoint``
    is the work that saves its containers now.
    """

    id: str
    config: cri_pb2.PodSandboxConfig
    record: SandboxRecord
    folder: SandboxFolder
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    holder_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    closing: bool = False
    port_forwards: set[asyncio.Task[object]] = field(default_factory=set)
    checkpoint: asyncio.Future[int] | None = None
    operations: list[Operation] = field(default_factory=list)
    list_item: bytes | None = None
    statistics: object | None = None

    def add_port_forward(self) -> None:
        """Add the calling task to ``port_forwards`` until it ends."""
        task = asyncio.current_task()
        if task is not None:
            self.port_forwards.add(task)
            task.add_done_callback(self.port_forwards.discard)

    async def end_port_forwards(self) -> None:
        """Cancel the port forwards and wait for their end."""
        if port_forwards := list(self.port_forwards):
            for task in port_forwards:
                task.cancel()
            await asyncio.wait(port_forwards)

    @property
    def title(self) -> str:
        """The sandbox's name in messages and logs."""
        return f"sandbox {self.id[:13]} ({self.config.metadata.namespace}/{self.config.metadata.name})"

    @property
    def namespace_options(self) -> cri_pb2.NamespaceOption:
        """The namespaces that its containers use."""
        return self.config.linux.security_context.namespace_options

    @property
    def host_network(self) -> bool:
        """Whether it uses the node's network."""
        return self.namespace_options.network == cri_pb2.NODE

    @property
    def user_namespace(self) -> bool:
        """Whether the pod has a user namespace."""
        options = self.namespace_options
        return options.HasField("userns_options") and options.userns_options.mode == cri_pb2.POD

    @property
    def own_namespaces(self) -> tuple[str, ...]:
        """The kinds of namespaces that are pinned for it from the start, except for the user namespace."""
        kinds = () if self.host_network else ("net", "uts")
        return kinds if self.namespace_options.ipc == cri_pb2.NODE else (*kinds, "ipc")

    @property
    def visible(self) -> bool:
        """Whether clients may see it."""
        return self.record.state in (SandboxState.READY, SandboxState.NOT_READY)

    def begin(self, name: str) -> Operation:
        """Begin to record an operation. The last eight are kept."""
        return keep_operation(self.operations, name, self.title)

    def changed(self) -> None:
        """Drop data that was derived from the record."""
        self.list_item = None


def keep_operation(kept: list[Operation], name: str, subject: str) -> Operation:
    """Add a new operation to the kept ones of a sandbox or container."""
    operation = Operation(name, subject)
    kept.append(operation)
    del kept[:-_OPERATIONS_KEPT]
    return operation
