"""An agent whose pods are connected by CNI plugins."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from host.files import mounts
from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess, running_agent, wait_for
from tests.support.cni_plugins import PluginFolders, failure, result
from tests.support.pods import container_config, sandbox_config

_PLUGINS = "/usr/lib/cni"
_PASS_ON = 'printf %s "$settings" | sed "s/.*prevResult\\":\\(.*\\)}/\\1/"'


@dataclass
class CniAgent:
    """An agent in CNI mode, with separate folders for configurations and plugins."""

    agent: AgentProcess
    folders: PluginFolders
    bridge: str

    def bridge_plugin(self) -> dict[str, object]:
        subnet = f"10.206.{random.randrange(128, 256)}.0/24"
        ipam = {"type": "host-local", "dataDir": str(self.folders.folder / "leases"), "subnet": subnet}
        return {"type": "bridge", "bridge": self.bridge, "isGateway": True, "ipam": ipam}

    def network_condition(self) -> cri_pb2.RuntimeCondition:
        status = self.agent.client.call("Status", cri_pb2.StatusRequest()).status
        found: list[cri_pb2.RuntimeCondition] = [c for c in status.conditions if c.type == "NetworkReady"]
        return found[0]

    @property
    def broken(self) -> Path:
        """While this exists, scripts that look for it fail."""
        return self.folders.folder / "broken"

    def unless_repaired(self) -> str:
        """A line of a script."""
        return f"if [ -e {self.broken} ]; then {failure(100, 'out of order')}; fi"

    def wait_ready(self) -> None:
        wait_for(lambda: self.network_condition().status, what="NetworkReady")

    def leases(self) -> list[str]:
        return [path.name for path in (self.folders.folder / "leases").rglob("10.*")]


@pytest.fixture
def cni(tmp_path: Path, busybox: Path) -> Iterator[CniAgent]:
    (tmp_path / "cni").mkdir()
    folders = PluginFolders(tmp_path / "cni")
    options = f"""
[network]
mode = "cni"
cni_config_dir = "{folders.configurations}"
cni_bin_dirs = ["{folders.programs}", "{_PLUGINS}"]
cni_timeout_seconds = 5
"""
    bridge = f"pktc{random.randrange(16**6):06x}"
    try:
        with running_agent(tmp_path, busybox, options=options) as agent:
            made = CniAgent(agent, folders, bridge)
            yield made
            made.broken.unlink(missing_ok=True)
    finally:
        subprocess.run(["ip", "link", "delete", bridge], check=False, capture_output=True)


def test_pods_reach_each_other_and_give_everything_back(cni: CniAgent) -> None:
    client = cni.agent.client
    condition = cni.network_condition()
    assert (condition.status, condition.reason) == (False, "CniNotConfigured")
    with pytest.raises(grpc.RpcError, match="no CNI configuration in") as refused:
        client.run_sandbox(sandbox_config(cni.agent))
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    cni.folders.configure(
        cni.bridge_plugin(),
        cni.folders.script("last", ADD=_PASS_ON),
    )
    cni.wait_ready()
    server_config = sandbox_config(cni.agent, annotations={"kubernetes.io/ingress-bandwidth": "10M"})
    server_config.port_mappings.add(container_port=80, host_port=31871)
    server = client.run_sandbox(server_config)
    address = client.sandbox_status(server).network.ip
    assert address.startswith("10.206.")
    assert address in cni.leases()
    serving = client.create(server, container_config("web", "httpd", "-f", "-p", "80", "-h", "/etc"), server_config)
    client.start(serving)
    other_config = sandbox_config(cni.agent)
    other = client.run_sandbox(other_config)
    asking = client.create(other, container_config("ask", "sleep", "1000"), other_config)
    client.start(asking)
    assert address in client.output(serving, "ip", "address", "show", "eth0")
    assert address in client.output(serving, "cat", "/etc/hosts")
    wait_for(lambda: client.exec(asking, "wget", "-qO-", f"http://{address}/hostname").exit_code == 0)
    assert client.exec(asking, "wget", "-qO-", "http://127.0.0.1/").exit_code != 0  # lo is up: refused, not unreachable
    subprocess.run(["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/31871"], check=True, timeout=5)
    environment = cni.folders.environment("ADD")
    assert f"K8S_POD_NAME={other_config.metadata.name}" in environment[3]
    assert client.findings() == []
    cni.agent.restart()
    client = cni.agent.client
    assert client.sandbox_status(server).network.ip == address
    assert client.findings() == []
    for sandbox_id in (server, other):
        client.stop_sandbox(sandbox_id)
        client.remove_sandbox(sandbox_id)
    assert cni.leases() == []
    assert client.findings() == []


def test_a_stop_is_completed_when_its_plugin_succeeds_again(cni: CniAgent) -> None:
    client = cni.agent.client
    cni.broken.touch()
    cni.folders.configure(cni.folders.script("bad", DEL=cni.unless_repaired()))
    cni.wait_ready()
    sandbox_id = client.run_sandbox(sandbox_config(cni.agent))
    for _ in range(2):
        with pytest.raises(grpc.RpcError, match="CNI plugin bad, DEL: failed with code 100: out of order"):
            client.stop_sandbox(sandbox_id)
    assert client.sandbox_status(sandbox_id).state == cri_pb2.SANDBOX_NOTREADY
    with pytest.raises(grpc.RpcError, match="out of order"):
        client.remove_sandbox(sandbox_id)
    pin = cni.agent.run / "sandboxes" / sandbox_id / "ns" / "net"
    assert pin.exists()
    cni.agent.restart()
    client = cni.agent.client
    assert client.sandbox_status(sandbox_id).state == cri_pb2.SANDBOX_NOTREADY
    assert any("waits for its release" in finding for finding in client.findings())
    cni.broken.unlink()
    wait_for(lambda: not pin.exists(), what="the end of the namespace")
    client.remove_sandbox(sandbox_id)
    wait_for(lambda: client.findings() == [])


def test_a_pod_whose_plugin_is_gone_for_good_is_removed_by_force(cni: CniAgent) -> None:
    client = cni.agent.client
    cni.folders.configure(cni.bridge_plugin(), cni.folders.script("bad", ADD=_PASS_ON))
    cni.wait_ready()
    sandbox_id = client.run_sandbox(sandbox_config(cni.agent))
    (cni.folders.programs / "bad").unlink()
    with pytest.raises(grpc.RpcError, match="CNI plugin bad is in none of"):
        client.stop_sandbox(sandbox_id)
    remove = cni.agent.command("rm", "--socket", cni.agent.address, sandbox_id)
    refused = subprocess.run(remove, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "CNI plugin bad is in none of" in refused.stderr
    forced = subprocess.run([*remove, "--force"], capture_output=True, text=True, check=False)
    assert forced.returncode == 0, forced.stderr
    assert f"given up: CNI network testnet of sandbox {sandbox_id}: DEL is given up" in forced.stderr
    assert list(client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest()).items) == []
    assert cni.leases() == []
    assert client.findings() == []
    assert list((cni.agent.run / "sandboxes").iterdir()) == []
    assert "DEL is given up" in cni.agent.log.read_text()


def test_an_incomplete_pod_is_removed_by_force(cni: CniAgent) -> None:
    client = cni.agent.client
    cni.broken.touch()
    cni.folders.configure(cni.folders.script("bad", ADD=failure(42, "no"), DEL=cni.unless_repaired()))
    cni.wait_ready()
    with pytest.raises(grpc.RpcError, match="failed with code 42"):
        client.run_sandbox(sandbox_config(cni.agent))
    (folder,) = (cni.agent.run / "sandboxes").iterdir()
    remove = cni.agent.command("rm", "--socket", cni.agent.address, "--force", folder.name)
    subprocess.run(remove, capture_output=True, check=True)
    assert not folder.exists()
    assert client.findings() == []


def test_reset_by_force_removes_networks_whose_plugins_fail(cni: CniAgent) -> None:
    client = cni.agent.client
    cni.folders.configure(cni.bridge_plugin(), cni.folders.script("bad", ADD=_PASS_ON))
    cni.wait_ready()
    sandbox_id = client.run_sandbox(sandbox_config(cni.agent))
    (cni.folders.programs / "bad").unlink()
    cni.agent.kill()
    reset = cni.agent.command("reset", "--yes", *cni.agent.flags)
    refused = subprocess.run(reset, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "CNI plugin bad is in none of" in refused.stderr
    assert cni.agent.data.exists()
    forced = subprocess.run([*reset, "--force"], capture_output=True, text=True, check=False)
    assert forced.returncode == 0, forced.stderr
    assert f"of sandbox {sandbox_id}: DEL is given up" in forced.stderr
    assert not cni.agent.data.exists()
    assert not cni.agent.run.exists()


def test_a_pod_that_cannot_be_made_or_undone_leaves_nothing_in_the_end(cni: CniAgent) -> None:
    client = cni.agent.client
    cni.broken.touch()
    cni.folders.configure(cni.folders.script("bad", ADD=failure(42, "no"), DEL=cni.unless_repaired()))
    cni.wait_ready()
    with pytest.raises(grpc.RpcError, match="step network: CNI plugin bad, ADD: failed with code 42: no"):
        client.run_sandbox(sandbox_config(cni.agent))
    assert list((cni.agent.run / "sandboxes").iterdir()) != []
    cni.broken.unlink()
    wait_for(lambda: list((cni.agent.run / "sandboxes").iterdir()) == [], what="the end of the sandbox")
    assert client.findings() == []


def test_an_agent_killed_while_a_plugin_works_undoes_it(cni: CniAgent) -> None:
    client = cni.agent.client
    begun = cni.folders.folder / "begun"
    cni.folders.configure(cni.folders.script("slow", ADD=f"touch {begun}; sleep 4"), cni.bridge_plugin())
    cni.wait_ready()
    call = client.future("RunPodSandbox", cri_pb2.RunPodSandboxRequest(config=sandbox_config(cni.agent)))
    wait_for(begun.exists)
    os.kill(cni.agent.pid(), signal.SIGKILL)  # before it could notice that the call is given up
    cni.agent.wait_dead()
    call.cancel()
    cni.agent.start()
    client = cni.agent.client
    wait_for(lambda: list((cni.agent.run / "sandboxes").iterdir()) == [], what="the end of the sandbox")
    assert [found.command for found in cni.folders.called()] == ["ADD", "DEL"]
    assert client.findings() == []


def test_bandwidth_annotations_that_are_no_rates_are_refused(cni: CniAgent) -> None:
    cni.folders.configure(cni.folders.script("one"))
    cni.wait_ready()
    config = sandbox_config(cni.agent, annotations={"kubernetes.io/egress-bandwidth": "fast"})
    with pytest.raises(grpc.RpcError, match=r"kubernetes.io/egress-bandwidth: 'fast' is not a quantity") as refused:
        cni.agent.client.run_sandbox(config)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert cni.agent.client.findings() == []


def test_a_pod_whose_undo_waits_for_its_plugins_keeps_neither_its_name_nor_its_ports(cni: CniAgent) -> None:
    """The same with another attempt to undo after a restart: DEL is repeated in the background until it succeeds."""
    client = cni.agent.client
    fails = cni.unless_repaired()
    cni.folders.configure(cni.folders.script("only", ADD=f"{fails}\n{result()}", DEL=fails))
    cni.wait_ready()
    config = sandbox_config(cni.agent)
    config.port_mappings.add(container_port=80, host_port=31873)
    cni.broken.touch()
    for _ in range(2):
        with pytest.raises(grpc.RpcError, match="out of order"):
            client.run_sandbox(config)
        assert any("waits for its release" in finding for finding in client.findings())
        cni.agent.restart()
        client = cni.agent.client
        cni.wait_ready()
    failed = {call.settings["name"] for call in cni.folders.called("DEL")}
    assert failed == {"testnet"}
    cni.folders.script("only", DEL=fails)  # ADD works, DEL does not yet
    sandbox_id = client.run_sandbox(config)
    assert client.run_sandbox(config) == sandbox_id
    cni.broken.unlink()
    wait_for(lambda: client.findings() == [], seconds=30, what="every DEL")
    subprocess.run(["nft", "list", "ruleset"], check=True, capture_output=True)
    assert client.sandbox_status(sandbox_id).state == cri_pb2.SANDBOX_READY
    client.stop_sandbox(sandbox_id)
    client.remove_sandbox(sandbox_id)
    assert client.findings() == []


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0"])
def test_a_pod_without_namespaces_goes_where_its_plugin_refuses_that(cni: CniAgent, version: str) -> None:
    """As after a reboot. GC releases what DEL fails for, if the plugins' version has GC."""
    client = cni.agent.client
    needs = f'if [ -z "$CNI_NETNS" ]; then {failure(4, "CNI_NETNS is required")}; fi'
    collect = cni.unless_repaired()
    cni.broken.touch()
    cni.folders.configure(cni.folders.script("only", DEL=needs, GC=collect), version=version)
    cni.wait_ready()
    config = sandbox_config(cni.agent)
    config.port_mappings.add(container_port=80, host_port=31874)
    sandbox_id = client.run_sandbox(config)
    cni.agent.kill()
    for target in mounts.mounts_below(cni.agent.run / "sandboxes" / sandbox_id):
        mounts.unmount(target, lazy=True)
    cni.agent.start()
    client = cni.agent.client
    cni.wait_ready()
    for _ in range(2):
        client.stop_sandbox(sandbox_id)
    client.remove_sandbox(sandbox_id)
    assert client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest()).items == []
    assert any("CNI_NETNS is required" in finding for finding in client.findings())
    again = client.run_sandbox(config)  # its host port is free
    client.stop_sandbox(again)
    client.remove_sandbox(again)
    cni.broken.unlink()
    cni.agent.restart()
    client = cni.agent.client
    if version == "1.1.0":
        wait_for(lambda: client.findings() == [], seconds=20, what="the end of what GC gave back")
    else:
        assert any("CNI_NETNS is required" in finding for finding in client.findings())
        cni.folders.script("only")
        wait_for(lambda: client.findings() == [], seconds=30, what="DEL")
