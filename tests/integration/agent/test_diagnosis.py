"""What the agent says of itself while it works and while its event loop hangs, and the archive for a report."""

from __future__ import annotations

import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from proto.podkeel.v1 import agent_pb2
from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess, running_agent, wait_for
from tests.support.pods import container_config, sandbox_config

SECRET = "a-password-in-the-environment"


def podkeel(agent: AgentProcess, *words: str) -> subprocess.CompletedProcess[str]:
    command = agent.command(*words, "--socket", agent.address)
    return subprocess.run(command, capture_output=True, text=True, check=False)


def text_of(agent: AgentProcess) -> str:
    return str(agent.client.call("Diagnose", agent_pb2.DiagnoseRequest()).text)


def read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None
    return file.read()


def test_the_diagnosis_shows_threads_tasks_pools_and_descriptors(agent: AgentProcess) -> None:
    done = podkeel(agent, "debug")
    assert done.returncode == 0, done.stderr
    assert f"pid {agent.pid()}" in done.stdout
    assert re.search(r"^== tasks: [1-9]", done.stdout, re.MULTILINE)
    assert re.search(r"cri/server\.py:\d+ _serve$", done.stdout, re.MULTILINE)
    assert "containers: 0 pieces of work, 0 of them wait; threads: at most 12" in done.stdout
    assert re.search(r"^== descriptors: \d+ of \d+$", done.stdout, re.MULTILINE)
    assert "-- MainThread" in done.stdout


@pytest.fixture
def faulty(tmp_path: Path, busybox: Path) -> Iterator[AgentProcess]:
    with running_agent(tmp_path, busybox) as agent:
        yield agent


def test_an_open_stage_has_its_object_and_age(faulty: AgentProcess) -> None:
    faulty.restart("RunPodSandbox.network:before:hang")
    made = faulty.client.future("RunPodSandbox", cri_pb2.RunPodSandboxRequest(config=sandbox_config(faulty)))
    wanted = re.compile(r"^RunPodSandbox \S.*: network: for \d+\.\d+ s$", re.MULTILINE)
    wait_for(lambda: wanted.search(text_of(faulty)), what="the stage")
    made.cancel()
    wait_for(lambda: "== open stages: 0" in text_of(faulty), what="the end of the stage")


def test_a_signal_shows_why_the_loop_hangs(faulty: AgentProcess) -> None:
    faulty.restart("RunPodSandbox.network:before:block")
    made = faulty.client.future("RunPodSandbox", cri_pb2.RunPodSandboxRequest(config=sandbox_config(faulty)))
    refused = podkeel(faulty, "debug")
    assert refused.returncode == 1
    assert f"process {faulty.pid()} got SIGQUIT" in refused.stderr
    wait_for(lambda: "end of the diagnosis" in faulty.log.read_text(), what="the diagnosis")
    log = faulty.log.read_text()
    assert re.search(r"^Current thread .*|^Thread .*most recent call first", log, re.MULTILINE)  # faulthandler's
    assert re.search(r"^RunPodSandbox \S.*: network: for", log, re.MULTILINE)
    assert re.search(r"tests/support/faults\.py:\d+ _block$", log, re.MULTILINE)
    made.cancel()
    faulty.kill()
    faulty.start()  # nothing that was being made stays
    assert faulty.client.findings() == []


def test_a_bundle_has_what_a_report_needs_and_no_secret(agent: AgentProcess, tmp_path: Path) -> None:
    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox)
    config = container_config("main", "sleep", "1000")
    config.envs.add(key="PASSWORD", value=SECRET.encode())
    container_id = agent.client.create(sandbox_id, config, sandbox)
    agent.client.start(container_id)
    archive = tmp_path / "podkeel-report.tar.gz"
    done = podkeel(agent, "debug", "bundle", str(archive))
    assert (done.returncode, done.stdout) == (0, f"{archive}\n"), done.stderr
    assert archive.stat().st_mode & 0o777 == 0o600
    with tarfile.open(archive) as tar:
        found = {member.name: read(tar, member) for member in tar}
    names = ("diagnosis.txt", "version.json", "status.json", "check.json", "config.toml", "node.txt", "programs.txt")
    assert set(found) == {f"podkeel-report/{name}" for name in (*names, "journal.txt")}
    assert not any(data.startswith(b"not available") for name, data in found.items() if "journal" not in name)
    assert b"== tasks:" in found["podkeel-report/diagnosis.txt"]
    assert not any(SECRET.encode() in data for data in found.values())
    again = podkeel(agent, "debug", "bundle", str(archive))
    assert again.returncode == 1
    assert "File exists" in again.stderr


@pytest.mark.parametrize("service", ["", "runtime.v1.RuntimeService", "runtime.v1.ImageService"])
def test_the_health_service_of_grpc_says_what_is_served(agent: AgentProcess, service: str) -> None:
    with grpc.insecure_channel(agent.address, options=[("grpc.default_authority", "localhost")]) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=30)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as refused:
            health.Check(health_pb2.HealthCheckRequest(service="runtime.v1.Other"), timeout=30)
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
