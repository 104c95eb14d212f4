"""Rows of sandboxes and containers; each call is one commit."""

from __future__ import annotations

import msgspec

from host.database import Database
from proto.runtime.v1 import cri_pb2
from runtime.container import Container, ContainerRecord
from runtime.sandbox import Sandbox, SandboxRecord

_encode = msgspec.msgpack.Encoder().encode
_decode_sandbox = msgspec.msgpack.Decoder(SandboxRecord).decode
_decode_container = msgspec.msgpack.Decoder(ContainerRecord).decode


class Store:
    """Sandboxes and containers in the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

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

    async def delete_sandbox(self, sandbox_id: str) -> None:
        """Delete a sandbox; it has no containers any more."""
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

    async def delete_container(self, container_id: str) -> None:
        """Delete a container."""
        await self._database.execute("DELETE FROM containers WHERE id = ?", (container_id,))

    def load(self) -> tuple[list[Sandbox], list[Container]]:
        """Everything the store knows, oldest first; for the start."""
        sandboxes = {
            sandbox_id: Sandbox(sandbox_id, cri_pb2.PodSandboxConfig.FromString(config), _decode_sandbox(record))
            for sandbox_id, config, record in self._database.read(
                "SELECT id, config, record FROM sandboxes ORDER BY created_at"
            )
        }
        containers = [
            Container(
                container_id,
                sandboxes[sandbox_id],
                cri_pb2.ContainerConfig.FromString(config),
                _decode_container(record),
            )
            for container_id, sandbox_id, config, record in self._database.read(
                "SELECT id, sandbox_id, config, record FROM containers ORDER BY created_at"
            )
        ]
        return list(sandboxes.values()), containers
