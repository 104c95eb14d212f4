"""The rows of sandboxes and containers. Each call is one commit."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec
from google.protobuf.message import DecodeError, EncodeError

from host.database import Database
from host.errors import PodkeelError
from host.files.set_aside import UnreadableRow
from proto.runtime.v1 import cri_pb2
from runtime.layout import Layout
from runtime.specgen.namespaces import user_mappings
from runtime.state import status
from runtime.state.container import Container, ContainerRecord
from runtime.state.record_checks import check_container, check_sandbox
from runtime.state.sandbox import Sandbox, SandboxRecord
from runtime.state.truncindex import is_id

_UNREADABLE = (DecodeError, EncodeError, msgspec.MsgspecError, PodkeelError, ValueError, TypeError, LookupError)

_encode = msgspec.msgpack.Encoder().encode
_decode_sandbox = msgspec.msgpack.Decoder(SandboxRecord).decode
_decode_container = msgspec.msgpack.Decoder(ContainerRecord).decode


class Store:
    """Sandboxes and containers in the database."""

    def __init__(self, database: Database, layout: Layout) -> None:
        self._database = database
        self._layout = layout
        self._changed: Callable[[Sandbox | Container], None] | None = None

    def when_written(self, callback: Callable[[Sandbox | Container], None]) -> None:
        """Call ``callback`` after each commit of a sandbox's or container's record."""
        self._changed = callback

    def _written(self, subject: Sandbox | Container) -> None:
        if self._changed is not None:
            self._changed(subject)

    async def add_sandbox(self, sandbox: Sandbox) -> None:
        """Write a new sandbox."""
        await self._database.execute(
            "INSERT INTO sandboxes VALUES (?, ?, ?, ?)",
            (sandbox.id, sandbox.record.created_at, sandbox.config.SerializeToString(), _encode(sandbox.record)),
        )

    async def save_sandbox(self, sandbox: Sandbox) -> None:
        """Write a sandbox's record."""
        sandbox.changed()
        await self._database.execute(
            "UPDATE sandboxes SET record = ? WHERE id = ?", (_encode(sandbox.record), sandbox.id)
        )
        self._written(sandbox)

    async def delete_sandbox(self, sandbox_id: str) -> None:
        """Delete a sandbox. It must have no containers."""
        await self._database.execute("DELETE FROM sandboxes WHERE id = ?", (sandbox_id,))

    async def add_container(self, container: Container) -> None:
        """Write a new container."""
        await self._database.execute(
            "INSERT INTO containers VALUES (?, ?, ?, ?, ?)",
            (
                container.id,
                container.sandbox.id,
                container.record.created_at,
                container.config.SerializeToString(),
                _encode(container.record),
            ),
        )

    async def save_container(self, container: Container) -> None:
        """Write a container's record."""
        container.changed()
        await self._database.execute(
            "UPDATE containers SET record = ? WHERE id = ?", (_encode(container.record), container.id)
        )
        self._written(container)

    async def delete_container(self, container_id: str) -> None:
        """Delete a container."""
        await self._database.execute("DELETE FROM containers WHERE id = ?", (container_id,))

    def load(self) -> tuple[list[Sandbox], list[Container]]:
        """All pods and containers of the store, oldest first. Rows that cannot be read are set aside."""
        sandboxes: dict[str, Sandbox] = {}
        unreadable: list[UnreadableRow] = []
        for row in self._database.read("SELECT id, created_at, config, record FROM sandboxes ORDER BY created_at"):
            try:
                sandboxes[row[0]] = self._read_sandbox(row[0], row[2], row[3])
            except _UNREADABLE as error:
                unreadable.append(UnreadableRow("sandbox", row[0], f"{type(error).__name__}: {error}", row))
        containers, lost = self._load_containers(sandboxes)
        self._database.set_rows_aside(lost, ("containers", "id"))
        self._database.set_rows_aside(unreadable, ("sandboxes", "id"))
        return list(sandboxes.values()), containers

    def _load_containers(self, sandboxes: Mapping[str, Sandbox]) -> tuple[list[Container], list[UnreadableRow]]:
        containers: list[Container] = []
        unreadable: list[UnreadableRow] = []
        columns = "id, sandbox_id, created_at, config, record"
        for row in self._database.read(f"SELECT {columns} FROM containers ORDER BY created_at"):
            try:
                if row[1] not in sandboxes:
                    raise ValueError("its sandbox cannot be read, or is missing")
                containers.append(self._read_container(sandboxes[row[1]], row[0], row[3], row[4]))
            except _UNREADABLE as error:
                unreadable.append(UnreadableRow("container", row[0], f"{type(error).__name__}: {error}", row))
        return containers, unreadable

    def _read_sandbox(self, sandbox_id: object, config: object, record: object) -> Sandbox:
        if not (isinstance(sandbox_id, str) and is_id(sandbox_id)):
            raise ValueError("its id is invalid")
        if not (isinstance(config, bytes) and isinstance(record, bytes)):
            raise ValueError("its configuration or its record is invalid")
        folder, parsed = self._layout.sandbox(sandbox_id), cri_pb2.PodSandboxConfig.FromString(config)
        sandbox = Sandbox(sandbox_id, parsed, _decode_sandbox(record), folder)
        if not sandbox.config.metadata.name:
            raise ValueError("its configuration has no name")
        user_mappings(sandbox.namespace_options)
        check_sandbox(sandbox)
        # Find everything now that would make a list or a status fail.
        status.sandbox_status(sandbox).SerializeToString()
        status.sandbox_item(sandbox).SerializeToString()
        for resources in (sandbox.record.resources, sandbox.record.overhead):
            cri_pb2.LinuxContainerResources.FromString(resources)
        return sandbox

    def _read_container(self, sandbox: Sandbox, container_id: object, config: object, record: object) -> Container:
        if not (isinstance(container_id, str) and is_id(container_id)):
            raise ValueError("its id is invalid")
        if not (isinstance(config, bytes) and isinstance(record, bytes)):
            raise ValueError("its configuration or its record is invalid")
        folder, parsed = self._layout.container(container_id), cri_pb2.ContainerConfig.FromString(config)
        container = Container(container_id, sandbox, parsed, _decode_container(record), folder)
        if not container.config.metadata.name:
            raise ValueError("its configuration has no name")
        check_container(container)
        status.container_status(container).SerializeToString()
        status.container_item(container).SerializeToString()
        return container
