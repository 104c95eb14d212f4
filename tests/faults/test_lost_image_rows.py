"""Rows of images' layers and names that are damaged in the store."""

from __future__ import annotations

import contextlib
import sqlite3

import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.conformance.support import Pod
from tests.support.agent import AgentProcess, build_busybox
from tests.support.pods import container_config, sandbox_config


@pytest.mark.parametrize("change", ["UPDATE {} SET image_id = 'nonsense'", "DELETE FROM image_layers"])
def test_an_image_without_its_layers_is_dropped(own_agent: AgentProcess, change: str) -> None:
    """A container would start without these files, and no layer could be deleted."""
    Pod.run(own_agent, sandbox_config(own_agent)).sleeping()
    own_agent.kill()
    with contextlib.closing(sqlite3.connect(own_agent.data / "podkeel.db", isolation_level=None)) as store:
        for table in ("image_layers", "image_references"):
            store.execute(change.format(table))
    own_agent.start()
    client = own_agent.client
    assert client.call("ListImages", cri_pb2.ListImagesRequest()).images == []
    own_agent.import_busybox(build_busybox(own_agent.folder))
    pod = Pod.run(own_agent, sandbox_config(own_agent))
    assert pod.printed(container_config("main", "echo", "here")) == "here\n"
    for sandbox in client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest()).items:
        client.remove_sandbox(sandbox.id)
    assert client.findings() == []
    with contextlib.closing(sqlite3.connect(own_agent.data / "podkeel.db")) as store:
        assert store.execute("PRAGMA foreign_key_check").fetchall() == []
