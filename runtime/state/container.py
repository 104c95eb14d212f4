"""A container: its configuration, its record, and its state."""

from __future__ import annotations

import asyncio
import enum
import os
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from host.processes import ProcessName
from host.stages import Operation
from proto.runtime.v1 import cri_pb2
from runtime.layout import ContainerFolder
from runtime.logs import LogFile
from runtime.specgen.limits.extra_limits import ExtraLimits
from runtime.state.sandbox import Sandbox, keep_operation


class ContainerState(enum.StrEnum):
    """Clients do not see ``making`` and ``removing``. The next start undoes the former and finishes the latter."""

    MAKING = "making"
    CREATED = "created"
    RUNNING = "running"
    EXITED = "exited"
    REMOVING = "removing"


class ContainerRecord(msgspec.Struct):
    """The store's data about a container besides its configuration. Times are in nanoseconds since the epoch.

    ``monitor`` is conmon, ``init`` the container's first process. ``start_error`` is the error for StartContainer: the
    OCI runtime found at create that the program cannot be executed. ``restored_image`` is the name of the image below a
    checkpoint; empty for a container that is not restored. ``extra_limits`` are limits of NRI plugins. ``changed_by``
    has the plugin that changed a field of the container last.
    """

    state: ContainerState
    created_at: int
    handler: str
    boot_id: str
    image_id: str
    image_ref: str
    cgroup: str
    started_at: int = 0
    finished_at: int = 0
    exit_code: int = 0
    reason: str = ""
    message: str = ""
    log_path: str = ""
    stop_signal: int = 15
    monitor: ProcessName | None = None
    init: ProcessName | None = None
    start_error: str = ""
    restored_image: str = ""
    user: tuple[int, int, tuple[int, ...]] = (0, 0, ())
    mounts: list[bytes] = msgspec.field(default_factory=list)
    resources: bytes = b""
    private_pid_namespace: bool = True
    extra_limits: ExtraLimits = ExtraLimits()
    changed_by: dict[str, str] = msgspec.field(default_factory=dict)


@dataclass(slots=True)
class Container:
    """A container in memory; ``folder`` is its bundle.

    ``lock`` serialises its changes. ``exited`` is set when its end is recorded. ``cleanup`` is the task that releases
    the OCI runtime's resources after the end; ``unmounted``: its mounts are removed. ``killed``: the agent sent SIGKILL
    to its first process while that ran. ``evicted`` has the NRI plugin that ended it, and the reason. ``stops`` counts
    the calls that wait for its end now, and ``stop_deadline`` is their earliest deadline, on the loop's clock.
    ``log_lock`` serialises openings of its log. ``checkpoint`` is the work that may keep it frozen now; a stop cancels
    it first. ``attached`` is the number of attached clients. ``process`` is the ``process`` object of its spec as JSON.
    It is read when the first command is executed in the container.
    ``limited`` is a digest of the spec whose limits the cgroup of a container to be restored has. ``restoring`` is
    there while CRIU restores it, and set then.
    """

    id: str
    sandbox: Sandbox
    config: cri_pb2.ContainerConfig
    record: ContainerRecord
    folder: ContainerFolder
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    log_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    exited: asyncio.Event = field(default_factory=asyncio.Event)
    cleanup: asyncio.Task[None] | None = None
    unmounted: bool = False
    killed: bool = False
    evicted: str = ""
    monitor_descriptor: int | None = None
    checkpoint: asyncio.Future[int] | None = None
    attached: int = 0
    process: bytes | None = None
    limited: bytes = b""
    restoring: asyncio.Event | None = None
    stops: int = 0
    stop_deadline: float | None = None
    stop_changed: asyncio.Event = field(default_factory=asyncio.Event)
    operations: list[Operation] = field(default_factory=list)
    list_item: bytes | None = None
    statistics: object | None = None

    @property
    def title(self) -> str:
        """The container's name in messages and logs."""
        pod = self.sandbox.config.metadata
        return f"container {self.id[:13]} ({pod.namespace}/{pod.name}/{self.config.metadata.name})"

    @property
    def log(self) -> LogFile | None:
        """Its log; None without a log."""
        if not self.record.log_path:
            return None
        return LogFile(Path(os.path.normpath(self.sandbox.config.log_directory)), Path(self.record.log_path))

    @property
    def visible(self) -> bool:
        """Whether clients may see it."""
        return self.record.state in (ContainerState.CREATED, ContainerState.RUNNING, ContainerState.EXITED)

    def begin(self, name: str) -> Operation:
        """Begin to record an operation. The last eight are kept."""
        return keep_operation(self.operations, name, self.title)

    def changed(self) -> None:
        """Drop data that was derived from the record."""
        self.list_item = None
