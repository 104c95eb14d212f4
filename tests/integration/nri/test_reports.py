"""What `podkeel check`, metrics and the log say about plugins and their socket, and what NRI costs that is off."""

from __future__ import annotations

import json
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from proto.nri.v1alpha1 import nri_pb2
from tests.support.agent import AgentProcess, running_agent, wait_for
from tests.support.nri import Recorder, connected
from tests.support.pods import remove_all_pods, run_container


@pytest.fixture
def agent(tmp_path: Path, busybox: Path) -> Iterator[AgentProcess]:
    """An agent that serves metrics and starts a plugin that ends with status 3."""
    made = AgentProcess(tmp_path, options='[metrics]\naddress = "127.0.0.1:0"\n')
    plugin = tmp_path / "nri-plugins/30-broken"
    plugin.parent.mkdir()
    plugin.write_text("#!/bin/sh\nexit 3\n")
    plugin.chmod(0o755)
    try:
        made.start()
        made.import_busybox(busybox)
        yield made
    finally:
        made.reset()


def checks(agent: AgentProcess) -> list[tuple[str, str, str]]:
    """State, name and detail of what `podkeel check` says about plugins."""
    command = agent.command("check", *agent.flags, "--format", "json")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)["checks"]
    return [(one["state"], one["name"], one["detail"]) for one in found if one["name"].startswith("NRI")]


def test_check_names_the_socket_and_the_plugins_that_failed(agent: AgentProcess) -> None:
    with connected(Recorder(agent.nri_socket, "20", "left")):
        pass
    with connected(Recorder(agent.nri_socket)):
        (service, broken) = checks(agent)
    assert service == ("ok", "NRI", f"1 plugin connected; others connect to {agent.nri_socket}")
    assert broken[:2] == ("warn", "NRI plugin")
    assert broken[2].startswith("30-broken: ")
    assert "ended with status 3" in broken[2]


def test_check_says_that_nri_is_off(tmp_path: Path) -> None:
    agent = AgentProcess(tmp_path, options="[nri]\nenabled = false\n")
    try:
        agent.start()
        assert checks(agent) == [("ok", "NRI", "off (nri.enabled)")]
    finally:
        agent.reset()


def test_metrics_count_calls_seconds_and_errors_of_each_plugin(agent: AgentProcess) -> None:
    refused: list[Any] = []

    def refuse_once(request: nri_pb2.CreateContainerRequest) -> None:
        refused.append(request)
        if len(refused) == 1:
            raise ValueError("not today")

    with connected(Recorder(agent.nri_socket, acting={"CreateContainer": refuse_once})):
        with pytest.raises(Exception, match="not today"):
            run_container(agent, "sleep", "1000")
        run_container(agent, "sleep", "1000")
    found = scrape(agent)
    assert found["podkeel_nri_calls_total", "CreateContainer"] == 2
    assert found["podkeel_nri_call_errors_total", "CreateContainer"] == 1
    assert found["podkeel_nri_calls_total", "RunPodSandbox"] == 2
    assert found["podkeel_nri_call_errors_total", "RunPodSandbox"] == 0
    assert 0 < found["podkeel_nri_call_seconds_total", "CreateContainer"] < 10
    assert found["podkeel_nri_calls_total", "PostStartContainer"] == 1


def scrape(agent: AgentProcess) -> dict[tuple[str, str], float]:
    """The metrics of the plugin 10-recorder, by name and event."""
    address = next(
        line.split("http://")[1].split("/")[0] for line in agent.log.read_text().splitlines() if "/metrics" in line
    )
    with urllib.request.urlopen(f"http://{address}/metrics") as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {
        (sample.name, sample.labels["event"]): sample.value
        for family in families
        for sample in family.samples
        if sample.labels.get("plugin") == "10-recorder"
    }


def test_a_path_of_the_socket_that_another_process_serves_refuses_the_start(tmp_path: Path) -> None:
    agent = AgentProcess(tmp_path)
    agent.run.mkdir()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(agent.nri_socket))
        other.listen()
        agent.launch()
        assert agent.process is not None
        assert agent.process.wait(30) != 0
    wait_for(lambda: "another process serves it" in agent.log.read_text())
    assert "set nri.socket to another path, or nri.external_connections to false" in agent.log.read_text()
    agent.reset()


@pytest.mark.parametrize("enabled", [False, True])
def test_nri_that_is_off_loads_no_code_and_makes_no_socket(
    tmp_path: Path, busybox: Path, monkeypatch: pytest.MonkeyPatch, enabled: bool
) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # each module that is loaded is a line of the log
    path = tmp_path / "nri/nri.sock"
    folder, switch = tmp_path / "nri-plugins", str(enabled).lower()
    options = f'[nri]\nenabled = {switch}\nsocket = "{path}"\nplugin_dir = "{folder}"\n'
    with running_agent(tmp_path, busybox, options=options) as agent:
        _, container_id = run_container(agent, "sleep", "1000")
        agent.client.stop(container_id)
        remove_all_pods(agent.client)
        loaded = {line.rsplit("|", 1)[1].strip() for line in agent.log.read_text().splitlines() if "|" in line}
        assert "runtime.agent" in loaded
        plugins = {name for name in loaded if name.startswith(("runtime.nri", "proto.nri", "proto.ttrpc"))}
        # The package and its options are those of the configuration.
        assert (plugins <= {"runtime.nri", "runtime.nri.options"}) is not enabled
        assert path.exists() is enabled
