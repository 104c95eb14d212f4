"""Version, Status, RuntimeConfig and UpdateRuntimeConfig."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import secrets
from pathlib import Path

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.conformance.support import Pod
from tests.support.agent import AgentProcess
from tests.support.pods import container_config, sandbox_config


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
    chosen = re.search('cgroup_driver = "(systemd|cgroupfs)"', os.environ.get("PODKEEL_TEST_RUNTIME_OPTIONS", ""))
    # By default the agent uses systemd if that runs and cgroups are version 2.
    has_systemd = Path("/run/systemd/system").is_dir() and Path("/sys/fs/cgroup/cgroup.controllers").exists()
    driver = chosen[1] if chosen else "systemd" if has_systemd else "cgroupfs"
    assert answer.linux.cgroup_driver == {"systemd": cri_pb2.SYSTEMD, "cgroupfs": cri_pb2.CGROUPFS}[driver]


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


def test_statuses_and_lists_are_the_same_after_a_crash(own_agent: AgentProcess) -> None:
    annotations = {"json": '{"a":"\\u0000"}', "control": "\u0001\n", "": "empty"}
    config = sandbox_config(own_agent, labels={"a": "b"}, annotations=annotations)
    pod = Pod.run(own_agent, config)
    container = container_config("main", "sleep", "1000", annotations=annotations)
    container.linux.security_context.run_as_user.value = 1000
    container.linux.resources.cpu_shares = 512
    container.mounts.add(container_path="/m", host_path=str(own_agent.folder / "mounted"), readonly=True)
    running = pod.start(container)
    created = pod.create(container_config("created", "true"))
    ended = pod.finished(container_config("ended", "sh", "-c", "exit 3")).id
    failed = pod.create(container_config("failed", "/no/such"))
    with pytest.raises(grpc.RpcError):
        own_agent.client.start(failed)
    own_agent.client.stop_sandbox(own_agent.client.run_sandbox(sandbox_config(own_agent)))

    def seen() -> list[object]:
        client = own_agent.client
        lists = [
            client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest()).items,
            client.call("ListContainers", cri_pb2.ListContainersRequest()).containers,
            client.call("ListImages", cri_pb2.ListImagesRequest()).images,
        ]
        statuses = [client.status(container_id) for container_id in (running, created, ended, failed)]
        by_id = [sorted(items, key=lambda item: str(item.id)) for items in lists]
        return [*by_id, statuses, client.sandbox_status(pod.id)]

    before = seen()
    own_agent.restart()
    assert seen() == before
    own_agent.client.start(created)
    assert own_agent.client.output(running, "id", "-u") == "1000\n"
