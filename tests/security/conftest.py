"""Shared by the tests of docs/security.md: agents, OCI runtimes, pods with and without a user namespace."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.agent.hardening import Attacker
from tests.support.agent import AgentProcess
from tests.support.pods import sandbox_config
from tests.support.registry import Registry, run_registry

if os.geteuid() != 0:
    pytest.skip("needs root", allow_module_level=True)

# The first host id of the user namespaces that these tests use.
FIRST_ID = 300_000

StartAttacker = Callable[[cri_pb2.ContainerConfig], Attacker]


@pytest.fixture(scope="session")
def registry() -> Iterator[Registry]:
    with run_registry() as running:
        yield running


@pytest.fixture
def quiet_log(agent: AgentProcess) -> Iterator[AgentProcess]:
    """The shared agent. Fails the test if the agent logs a traceback during it."""
    before = agent.log.stat().st_size
    yield agent
    assert agent.tracebacks(before) == []


@pytest.fixture(params=["node's users", "user namespace"])
def user_namespace(request: pytest.FixtureRequest, agent: AgentProcess, handler: str) -> bool:
    """Whether the test's pods have a user namespace. Each test runs with and without one."""
    wanted = str(request.param) == "user namespace"
    handlers = agent.client.call("Status", cri_pb2.StatusRequest()).runtime_handlers
    if wanted and handler not in [handler.name for handler in handlers if handler.features.user_namespaces]:
        pytest.skip(f"{handler} has no user namespaces here")
    return wanted


def pod_config(agent: AgentProcess, *, user_namespace: bool = False) -> cri_pb2.PodSandboxConfig:
    """A pod as kubelet configures it, with a user namespace if requested."""
    config = sandbox_config(agent)
    if user_namespace:
        options = config.linux.security_context.namespace_options
        options.userns_options.mode = cri_pb2.POD
        options.userns_options.uids.add(host_id=FIRST_ID, container_id=0, length=65536)
        options.userns_options.gids.add(host_id=FIRST_ID, container_id=0, length=65536)
    return config


@pytest.fixture
def attacker(agent: AgentProcess, handler: str, user_namespace: bool) -> StartAttacker:
    """Starts a container in a separate pod, under each OCI runtime, with and without a user namespace."""

    def start(config: cri_pb2.ContainerConfig) -> Attacker:
        sandbox = pod_config(agent, user_namespace=user_namespace)
        config.linux.security_context.namespace_options.CopyFrom(sandbox.linux.security_context.namespace_options)
        sandbox_id = agent.client.run_sandbox(sandbox, handler)
        container_id = agent.client.create(sandbox_id, config, sandbox)
        agent.client.start(container_id)
        return Attacker(agent, sandbox, sandbox_id, container_id)

    return start
