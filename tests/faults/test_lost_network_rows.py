"""Rows of the built-in network that are lost from the store while their pod runs."""

from __future__ import annotations

import contextlib
import sqlite3

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess
from tests.support.pods import sandbox_config


@pytest.mark.parametrize("damage", ["gone", "x'ff00'"])
def test_no_other_pod_gets_addresses_and_ports_whose_rows_are_lost(own_agent: AgentProcess, damage: str) -> None:
    sandbox = sandbox_config(own_agent)
    sandbox.port_mappings.add(container_port=80, host_port=18081, protocol=cri_pb2.TCP)
    sandbox_id = own_agent.client.run_sandbox(sandbox)
    address = own_agent.client.sandbox_status(sandbox_id).network.ip
    own_agent.kill()
    change = "DELETE FROM {}" if damage == "gone" else f"UPDATE {{}} SET sandbox_id = {damage}"
    with contextlib.closing(sqlite3.connect(own_agent.data / "podkeel.db", isolation_level=None)) as store:
        for table in ("network_addresses", "network_host_ports"):
            store.execute(change.format(table))
    own_agent.start()
    client = own_agent.client
    assert client.sandbox_status(sandbox_id).network.ip == address
    assert client.sandbox_status(client.run_sandbox(sandbox_config(own_agent))).network.ip != address
    other = sandbox_config(own_agent)
    other.port_mappings.extend(sandbox.port_mappings)
    with pytest.raises(grpc.RpcError) as raised:
        client.run_sandbox(other)
    assert raised.value.code() is grpc.StatusCode.ALREADY_EXISTS
    assert not [finding for finding in client.findings() if "row" not in finding]
    client.remove_sandbox(sandbox_id)
    client.run_sandbox(other)
    with contextlib.closing(sqlite3.connect(own_agent.data / "podkeel.db")) as store:
        held = "SELECT count(*) FROM network_addresses WHERE released_at IS NULL"
        assert store.execute(held).fetchall() == [(2,)]
