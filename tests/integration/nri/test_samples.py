"""The sample plugins, started by the agent from its folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.agent import AgentProcess, wait_for
from tests.support.nri import MANIFESTS
from tests.support.pods import container_config, sandbox_config


@pytest.fixture
def agent(tmp_path: Path, busybox: Path) -> Iterator[AgentProcess]:
    made = AgentProcess(tmp_path)
    configuration = tmp_path / "config.toml"
    # A Python that starts beside many others takes longer than the five seconds that a plugin has to register.
    text = configuration.read_text().replace("[nri]\n", "[nri]\nregistration_seconds = 60\n")
    configuration.write_text(text)
    plugins = tmp_path / "nri-plugins"
    plugins.mkdir()
    for name, sample in (("90-logger", "logger.py"), ("10-device-injector", "device_injector.py")):
        (plugins / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "{MANIFESTS / sample}"\n')
        (plugins / name).chmod(0o755)
    (plugins / "notes.txt").write_text("no plugin")
    try:
        made.start()
        made.import_busybox(busybox)
        yield made
    finally:
        made.reset()


def test_the_samples_are_started_log_events_and_inject_a_device(agent: AgentProcess) -> None:
    log = agent.log.read_text()
    assert "nri: plugin 10-device-injector: connected" in log
    assert "nri: plugin 90-logger: connected" in log
    assert "notes.txt: not started: its name is not two digits" in log
    device = yaml.safe_dump([{"path": "/dev/injected", "type": "c", "major": 1, "minor": 5, "file_mode": 0o666}])
    sandbox = sandbox_config(agent, annotations={"devices.noderesource.dev/container.main": device})
    sandbox_id = agent.client.run_sandbox(sandbox)
    container_id = agent.client.create(sandbox_id, container_config("main", "sleep", "1000"), sandbox)
    agent.client.start(container_id)
    assert agent.client.output(container_id, "sh", "-c", "head -c 3 /dev/injected | wc -c").strip() == "3"
    agent.client.remove_sandbox(sandbox_id)
    name = f"default/{sandbox.metadata.name}"
    wait_for(lambda: f"90-logger: RemovePodSandbox: {name}" in agent.log.read_text())
    wait_for(lambda: f"90-logger: StopContainer: {name}/main" in agent.log.read_text())


def _started(agent: AgentProcess) -> list[int]:
    return [int(line.split()[0]) for line in (agent.run / "nri-plugins").read_text().splitlines()]


def test_started_plugins_end_with_the_agent_and_with_a_killed_one_at_the_next_start(agent: AgentProcess) -> None:
    first = _started(agent)
    assert len(first) == 2
    agent.restart()
    second = _started(agent)
    assert not set(first) & set(second)
    wait_for(lambda: agent.log.read_text().count(": connected: events") == 4)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in first), what="the end of the first plugins")
    os.kill(second[0], 9)
    wait_for(lambda: f"pid {second[0]} ended with status -9; it is not started again" in agent.log.read_text())
    agent.stop()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in second), what="the end of the plugins")
