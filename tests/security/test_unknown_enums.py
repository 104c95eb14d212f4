"""Unknown numbers of an enum cause INVALID_ARGUMENT with the field's name, never an internal error."""

from __future__ import annotations

from collections.abc import Callable

import grpc
import pytest
from google.protobuf.message import Message

from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess
from tests.support.pods import container_config, sandbox_config


def refused(agent: AgentProcess, name: str, request: Message) -> str:
    with pytest.raises(grpc.RpcError) as error:
        if name.startswith("Stream"):
            list(agent.client.stream(name, request))
        else:
            agent.client.call(name, request)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT, error.value.details()
    return error.value.details() or ""


def _port(config: cri_pb2.PodSandboxConfig) -> None:
    config.port_mappings.add(container_port=80, host_port=8080)
    config.port_mappings.add(container_port=80, protocol=77)


OPTIONS = "config.linux.security_context.namespace_options"
POD: dict[str, Callable[[cri_pb2.PodSandboxConfig], object]] = {
    f"{OPTIONS}.{field}": lambda config, field=field: setattr(
        config.linux.security_context.namespace_options, field, 77
    )
    for field in ("network", "pid", "ipc")
} | {
    f"{OPTIONS}.userns_options.mode": lambda config: setattr(
        config.linux.security_context.namespace_options.userns_options, "mode", 77
    ),
    "config.linux.security_context.seccomp.profile_type": lambda config: setattr(
        config.linux.security_context.seccomp, "profile_type", 77
    ),
    "config.port_mappings[1].protocol": _port,
}


@pytest.mark.parametrize("field", POD)
def test_no_pod_is_created_with_an_unknown_enum_number(quiet_log: AgentProcess, field: str) -> None:
    config = sandbox_config(quiet_log)
    POD[field](config)
    request = cri_pb2.RunPodSandboxRequest(config=config)
    assert f"{field}: 77 is not a " in refused(quiet_log, "RunPodSandbox", request)


CONTAINER: dict[str, Callable[[cri_pb2.ContainerConfig], object]] = {
    "config.stop_signal": lambda config: setattr(config, "stop_signal", 77),
    "config.mounts[0].propagation": lambda config: config.mounts.add(
        container_path="/x", host_path="/tmp", propagation=77
    ),
    "config.linux.security_context.supplemental_groups_policy": lambda config: setattr(
        config.linux.security_context, "supplemental_groups_policy", 77
    ),
    "config.linux.security_context.apparmor.profile_type": lambda config: setattr(
        config.linux.security_context.apparmor, "profile_type", 77
    ),
    f"{OPTIONS}.pid": lambda config: setattr(config.linux.security_context.namespace_options, "pid", 77),
}


@pytest.mark.parametrize("field", CONTAINER)
def test_no_container_is_created_with_an_unknown_enum_number(quiet_log: AgentProcess, field: str) -> None:
    sandbox = sandbox_config(quiet_log)
    config = container_config("main", "true")
    CONTAINER[field](config)
    request = cri_pb2.CreateContainerRequest(
        pod_sandbox_id=quiet_log.client.run_sandbox(sandbox), config=config, sandbox_config=sandbox
    )
    assert f"{field}: 77 is not a " in refused(quiet_log, "CreateContainer", request)


@pytest.mark.parametrize("name", ["ListContainers", "StreamContainers", "ListPodSandbox", "StreamPodSandboxes"])
def test_no_list_is_filtered_by_an_unknown_enum_number(quiet_log: AgentProcess, name: str) -> None:
    request = getattr(cri_pb2, f"{name}Request")()
    request.filter.state.state = 77
    assert "filter.state.state: 77 is not a " in refused(quiet_log, name, request)
