"""The systemd unit under systemd: what its restarts, its end for memory and its settings do to containers."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.agent.hardening import init_pid
from tests.support.agent import AgentProcess, wait_for
from tests.support.cri import CriClient
from tests.support.pods import remove_all_pods, run_container
from tests.vm.cgroup_files import properties

if not Path("/run/systemd/system").is_dir():
    pytest.skip("needs systemd as init: make test-vm runs this", allow_module_level=True)

UNIT = "podkeel.service"
MANIFEST = Path(__file__).parents[2] / "manifests/systemd" / UNIT
UNITS = Path("/run/systemd/system")


@pytest.fixture
def service(tmp_path: Path, busybox: Path) -> Iterator[AgentProcess]:
    """The unit as it is in manifests/, with a drop-in that names another program, started."""
    agent = AgentProcess(tmp_path)
    dropin = UNITS / f"{UNIT}.d"
    shutil.copy(MANIFEST, UNITS / UNIT)
    dropin.mkdir()
    command = shlex.join(agent.command("serve", *agent.flags))
    (dropin / "command.conf").write_text(f"[Service]\nTimeoutStartSec=1200\nExecStart=\nExecStart={command}\n")
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    try:
        subprocess.run(["systemctl", "start", UNIT], check=True)
        agent.connect()
        agent.import_busybox(busybox)
        yield agent
        remove_all_pods(agent.client)
    finally:
        subprocess.run(["systemctl", "stop", UNIT], check=True)
        (UNITS / UNIT).unlink()
        shutil.rmtree(dropin)
        subprocess.run(["systemctl", "daemon-reload"], check=True)
        agent.reset()


def main_pid() -> int:
    return int(properties(UNIT, "MainPID")["MainPID"])


def running(client: CriClient, container_id: str) -> bool:
    return bool(client.status(container_id).state == cri_pb2.CONTAINER_RUNNING)


def test_containers_live_on_when_the_service_restarts_or_is_killed_for_memory(service: AgentProcess) -> None:
    _, container_id = run_container(service, "sleep", "100000")
    first, agent = init_pid(service, container_id), main_pid()
    subprocess.run(["systemctl", "restart", UNIT], check=True)
    service.connect()
    assert main_pid() != agent
    assert running(service.client, container_id)
    assert init_pid(service, container_id) == first

    agent = main_pid()
    subprocess.run(["systemctl", "set-property", "--runtime", UNIT, "MemoryMax=24M"], check=True)
    wait_for(lambda: main_pid() != agent, 60, "the end of an agent over its memory limit")
    subprocess.run(["systemctl", "set-property", "--runtime", UNIT, "MemoryMax=4G"], check=True)
    wait_for(lambda: properties(UNIT, "ActiveState")["ActiveState"] == "active", 60, "the agent's next start")
    service.connect()
    assert running(service.client, container_id)
    assert init_pid(service, container_id) == first
    assert service.client.output(container_id, "echo", "here").strip() == "here"


def test_containers_are_outside_of_the_service_and_have_nothing_of_its_settings(service: AgentProcess) -> None:
    _, container_id = run_container(service, "sleep", "100000")
    pid = init_pid(service, container_id)
    own = properties(UNIT, "ControlGroup")["ControlGroup"]
    assert own.endswith(f"/{UNIT}")
    assert own not in Path(f"/proc/{pid}/cgroup").read_text()
    told = service.client.output(container_id, "sh", "-c", "umask; ulimit -c; cat /proc/self/oom_score_adj")
    assert told.split() == ["0022", "unlimited", "0"]
    status = Path(f"/proc/{pid}/status").read_text()
    assert "Seccomp:\t0" in status
    assert "NoNewPrivs:\t0" in status
    assert (service.run / "podkeel.sock").stat().st_mode & 0o777 == 0o660
    assert Path(f"/proc/{main_pid()}/oom_score_adj").read_text().strip() == "-999"
