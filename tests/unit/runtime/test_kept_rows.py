"""Rows that are kept in the run folder: of what stays, not of what is being removed."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from pathlib import Path

from host.database import Database
from proto.runtime.v1 import cri_pb2
from runtime.layout import Layout
from runtime.recovery.kept_rows import KeptRows
from runtime.state.sandbox import Sandbox, SandboxRecord, SandboxState
from tests.support.agent import wait_for

SCHEMAS = {
    "runtime": ["CREATE TABLE sandboxes (id TEXT PRIMARY KEY, record BLOB)"],
    "network": [
        "CREATE TABLE network_attachments (sandbox_id); CREATE TABLE network_addresses (sandbox_id);"
        "CREATE TABLE network_host_ports (sandbox_id); CREATE TABLE network_cni_attachments (sandbox_id);"
        "CREATE TABLE network_pod_cidrs (cidr)"
    ],
}


def _sandbox(layout: Layout, name: str, state: SandboxState) -> Sandbox:
    layout.sandbox(name).path.mkdir(parents=True)
    config = cri_pb2.PodSandboxConfig(metadata=cri_pb2.PodSandboxMetadata(name=name))
    return Sandbox(name, config, SandboxRecord(state, 1, "crun", "", "boot"), layout.sandbox(name))


def test_a_sandbox_that_is_stopped_is_not_written_any_more(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "data", tmp_path / "run")
    layout.data.mkdir()

    async def body() -> None:
        database = Database(tmp_path / "data" / "podkeel.db", SCHEMAS)
        kept = KeptRows(database)
        stays, goes, making = (
            _sandbox(layout, name, state)
            for name, state in (("s", SandboxState.READY), ("g", SandboxState.READY), ("m", SandboxState.MAKING))
        )
        for one in (stays, goes, making):
            kept.note(one)
        kept.start(())
        goes.record.state = SandboxState.NOT_READY
        kept.note(goes)
        await asyncio.to_thread(wait_for, layout.sandbox("s").kept_rows.exists)
        await kept.close()
        database.close()

    asyncio.run(body())
    assert [path.name for path in (tmp_path / "run" / "sandboxes").iterdir() if (path / "rows").exists()] == ["s"]
    with contextlib.closing(sqlite3.connect(tmp_path / "data" / "podkeel.db")) as connection:
        assert connection.execute("SELECT count(*) FROM sandboxes").fetchone() == (0,)
