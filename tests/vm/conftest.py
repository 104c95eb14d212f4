from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.conformance.support import Pod
from tests.support.agent import AgentProcess
from tests.support.pods import sandbox_config

CGROUPS = Path("/sys/fs/cgroup")

if not (CGROUPS / "cgroup.controllers").exists():
    pytest.skip("needs cgroup v2 at /sys/fs/cgroup: make test-vm runs this", allow_module_level=True)


@pytest.fixture
def pod(agent: AgentProcess) -> Pod:
    return Pod.run(agent, sandbox_config(agent))


@pytest.fixture
def privileged_pod(agent: AgentProcess) -> Pod:
    config = sandbox_config(agent)
    config.linux.security_context.privileged = True
    return Pod.run(agent, config)
