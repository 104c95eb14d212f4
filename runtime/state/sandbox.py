"""A pod sandbox: its configuration, what is known of it, and its state."""

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
    """``making`` and ``removing`` are not seen by clients: the next start undoes the one and finishes the other."""

    MAKING = "making"
    READY = "ready"
    NOT_READY = "not_ready"
    REMOVING = "removing"


class SandboxRecord(msgspec.Struct):
    """What the store keeps of a sandbox beside its configuration; times in nanoseconds since the epoch.

    ``handler`` is the runtime handler in use, ``requested_handler`` the name the client gave (empty for the default).
    ``torn_down`` says that network and namespaces were released. ``oom_kills`` are those in its cgroup that ended
    containers, or times before it, account for. ``selinux_level`` is the pod's own where the node has SELinux.
    ``restoring`` is the call of RestorePod that makes it, until that is complete: the next start removes it then.
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

    ``lock`` serialises what changes it; while it is ``closing`` it takes no new containers. ``port_forwards`` are tasks
    with sockets in its network, which would keep that alive: they are cancelled before it is taken down.
    ``checkpoint`` is the work that saves containers of it now.
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
        """Make the calling task one of the ``port_forwards`` until it ends."""
        task = asyncio.current_task()
        if task is not None:
            self.port_forwards.add(task)
            task.add_done_callback(self.port_forwards.discard)

    async def end_port_forwards(self) -> None:
        """Cancel them and wait for their end."""
        if port_forwards := list(self.port_forwards):
            for task in port_forwards:
                task.cancel()
            await asyncio.wait(port_forwards)

    @property
    def title(self) -> str:
        """How messages and logs name it."""
        return f"sandbox {self.id[:13]} ({self.config.metadata.namespace}/{self.config.metadata.name})"

    @property
    def namespace_options(self) -> cri_pb2.NamespaceOption:
        """Whose namespaces its containers use."""
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
        """Start recording an operation; the last eight are kept."""
        return keep_operation(self.operations, name, self.title)

    def changed(self) -> None:
        """Forget what was derived from the record."""
        self.list_item = None


def keep_operation(kept: list[Operation], name: str, subject: str) -> Operation:
    """Add a new operation to those that are kept of a sandbox or container."""
    operation = Operation(name, subject)
    kept.append(operation)
    del kept[:-_OPERATIONS_KEPT]
    return operation
