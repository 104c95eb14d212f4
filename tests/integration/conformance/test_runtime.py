"""Version, Status, RuntimeConfig and UpdateRuntimeConfig."""

from __future__ import annotations

import ipaddress
import json
import re
import secrets

from proto.runtime.v1 import cri_pb2
from tests.integration.conformance.support import Pod
from tests.support.agent import AgentProcess
from tests.support.pods import sandbox_config


def test_version_is_the_same_for_every_client(agent: AgentProcess) -> None:
    for asked in ("", "v1", "0.1.0"):
        version = agent.client.call("Version", cri_pb2.VersionRequest(version=asked))
        assert (version.version, version.runtime_name, version.runtime_api_version) == ("0.1.0", "podkeel", "v1")
        assert re.fullmatch(r"\d+\.\d+\.\d+.*", version.runtime_version)


def test_status_names_handlers_and_features(agent: AgentProcess) -> None:
    status = agent.client.call("Status", cri_pb2.StatusRequest())
    conditions = {condition.type: condition for condition in status.status.conditions}
    assert conditions["RuntimeReady"].status
    assert conditions["NetworkReady"].status
    assert not any(condition.reason or condition.message for condition in conditions.values())
    handlers = {handler.name: handler.features for handler in status.runtime_handlers}
    assert len(handlers) == len(status.runtime_handlers)
    assert any(handlers[""] == features for name, features in handlers.items() if name)
    assert status.features.supplemental_groups_policy
    assert not status.info


def test_verbose_status_is_json(agent: AgentProcess) -> None:
    status = agent.client.call("Status", cri_pb2.StatusRequest(verbose=True))
    config = json.loads(status.info["config"])
    assert config["runtime"]["run_dir"] == str(agent.run)
    assert all(json.loads(value) is not None for value in status.info.values())


def test_runtime_config_says_the_driver(agent: AgentProcess) -> None:
    answer = agent.client.call("RuntimeConfig", cri_pb2.RuntimeConfigRequest())
    assert answer.linux.cgroup_driver == cri_pb2.CGROUPFS


def test_pod_cidrs_hold_for_new_pods_and_after_a_restart(own_agent: AgentProcess) -> None:
    before = Pod.run(own_agent, sandbox_config(own_agent))
    address = own_agent.client.sandbox_status(before.id).network.ip
    number = secrets.randbelow(256)
    cidrs = (f"10.207.{number}.0/24", f"fd00:207:{number:x}::/64")
    given = cri_pb2.RuntimeConfig(network_config=cri_pb2.NetworkConfig(pod_cidr=",".join(cidrs)))
    for _ in range(2):
        own_agent.client.call("UpdateRuntimeConfig", cri_pb2.UpdateRuntimeConfigRequest(runtime_config=given))
    own_agent.client.call("UpdateRuntimeConfig", cri_pb2.UpdateRuntimeConfigRequest())
    for _ in range(2):
        pod = Pod.run(own_agent, sandbox_config(own_agent))
        network = own_agent.client.sandbox_status(pod.id).network
        assert ipaddress.ip_address(network.ip) in ipaddress.ip_network(cidrs[0])
        (other,) = network.additional_ips
        assert ipaddress.ip_address(other.ip) in ipaddress.ip_network(cidrs[1])
        assert own_agent.client.sandbox_status(before.id).network.ip == address
        own_agent.restart()
