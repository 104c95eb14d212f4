"""`podkeel check --repair` on an agent that serves: what it makes again, what it removes, and what it never touches."""

from __future__ import annotations

import json
import secrets
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from host.files import mounts
from network.attachment import interface_name
from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess, wait_for
from tests.support.cri import CriClient
from tests.support.pods import container_config, sandbox_config


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def _repair(agent: AgentProcess, *more: str) -> tuple[dict[str, str], int]:
    """The states of what the agent found, by kind and object, and the exit status."""
    command = agent.command("check", "--format", "json", *more, *agent.flags)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    checks: list[dict[str, Any]] = json.loads(done.stdout)["checks"]
    found = [check for check in checks if check["name"].startswith("agent: ")]
    return {f"{check['name']} {check['detail'].partition(':')[0]}": check["state"] for check in found}, done.returncode


def _reaches(client: CriClient, container: str, address: str) -> bool:
    return client.exec(container, "timeout", "2", "wget", "-qO-", f"http://{address}/hostname").exit_code == 0


@pytest.fixture
def bystanders(agent: AgentProcess) -> Iterator[list[list[str]]]:
    """A link, a table and a namespace that others made, and the commands that show them."""
    name = f"pkt{secrets.token_hex(4)}"
    _ip("link", "add", name, "type", "bridge")
    _ip("link", "add", f"{name}p", "type", "veth", "peer", "name", f"{name}q")
    _ip("link", "set", f"{name}p", "master", name)
    _ip("netns", "add", name)
    subprocess.run(["nft", "add", "table", "inet", name], check=True)
    shown = [["ip", "-o", "link", "show", "dev", f"{name}p"], ["ip", "-o", "link", "show", "dev", name]]
    yield [*shown, ["ip", "netns", "exec", name, "ip", "-o", "link"], ["nft", "list", "table", "inet", name]]
    subprocess.run(["nft", "delete", "table", "inet", name], check=True)
    _ip("netns", "delete", name)
    _ip("link", "delete", f"{name}p")
    _ip("link", "delete", name)


def test_repair_restores_the_network_and_changes_no_other_table(
    agent: AgentProcess, bystanders: list[list[str]]
) -> None:
    client = agent.client
    pods: list[tuple[str, str, str]] = []
    for _ in range(2):
        config = sandbox_config(agent)
        sandbox_id = client.run_sandbox(config)
        container = client.create(sandbox_id, container_config("web", "httpd", "-f", "-p", "80", "-h", "/etc"), config)
        client.start(container)
        pods.append((sandbox_id, container, client.sandbox_status(sandbox_id).network.ip))
    (one, _, one_ip), (_two, other, _) = pods
    wait_for(lambda: _reaches(client, other, one_ip), what="an answer of the server")
    before = [subprocess.run(command, check=True, capture_output=True).stdout for command in bystanders]
    stray = interface_name(agent.bridge, "stray")
    _ip("link", "add", stray, "type", "ifb")
    _ip("link", "delete", agent.bridge)
    lost = interface_name(agent.bridge, one)
    _ip("link", "delete", lost)
    assert not _reaches(client, other, one_ip)
    condition = client.call("Status", cri_pb2.StatusRequest()).status.conditions[1]
    assert (condition.status, condition.reason) == (False, "BridgeMissing")
    listed, status = _repair(agent)
    wrong = {f"agent: bridge {agent.bridge}", f"agent: link {lost}", f"agent: link {stray}"}
    assert wrong <= set(listed)
    assert (set(listed.values()), status) == ({"fail"}, 1)
    repaired, status = _repair(agent, "--repair")
    assert wrong <= set(repaired)
    assert set(repaired.values()) == {"ok"}
    assert client.findings() == []
    assert _reaches(client, other, one_ip)
    assert _repair(agent)[0] == {}
    assert [subprocess.run(command, check=True, capture_output=True).stdout for command in bystanders] == before
    for sandbox_id, _, _ in pods:
        client.stop_sandbox(sandbox_id)
        client.remove_sandbox(sandbox_id)


def test_repair_removes_leftovers_and_nothing_that_lives(agent: AgentProcess) -> None:
    client = agent.client
    config = sandbox_config(agent)
    sandbox_id = client.run_sandbox(config)
    container = client.create(sandbox_id, container_config("main", "sleep", "1000"), config)
    client.start(container)
    folders = [agent.run / kind / ("ab" * 32) for kind in ("sandboxes", "containers")]
    for folder in folders:
        folder.mkdir()
    pin = folders[0] / "ns" / "net"
    pin.parent.mkdir()
    pin.touch()
    mounts.bind("/proc/self/ns/net", pin)
    exit_file = agent.run / "exits" / ("cd" * 32)
    exit_file.write_text("0")
    repaired, _ = _repair(agent, "--repair")
    assert set(repaired.values()) == {"ok"}
    assert {f"agent: folder {folder}" for folder in folders} | {f"agent: mount {pin}"} <= set(repaired)
    assert not any(path.exists() for path in (*folders, exit_file))
    assert client.status(container).state == cri_pb2.CONTAINER_RUNNING
    assert client.exec(container, "true").exit_code == 0
    client.stop_sandbox(sandbox_id)
    client.remove_sandbox(sandbox_id)
    assert client.findings() == []


def test_repair_leaves_pods_alone_that_are_made_and_removed_meanwhile(agent: AgentProcess) -> None:
    client = agent.client
    repairing = [
        subprocess.Popen(
            agent.command("check", "--repair", *agent.flags), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(2)
    ]
    rounds = 0
    while rounds < 5 or any(process.poll() is None for process in repairing):
        config = sandbox_config(agent)
        sandbox_id = client.run_sandbox(config)
        container = client.create(sandbox_id, container_config("main", "sleep", "1000"), config)
        client.start(container)
        assert client.exec(container, "ping", "-c", "1", "-W", "2", agent.subnet.replace(".0/20", ".1")).exit_code == 0
        client.stop_sandbox(sandbox_id)
        client.remove_sandbox(sandbox_id)
        rounds += 1
    assert client.findings() == []
