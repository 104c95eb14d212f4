"""The systemd unit: its effect on the agent, and that none of its options affects containers."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.integration.agent.hardening import like_kubelets
from tests.security.conftest import StartAttacker
from tests.support.agent import AgentProcess

UNIT = Path(__file__).parents[2] / "manifests/systemd/podkeel.service"

# systemd implements these options with a filter of system calls, no_new_privs, a mount namespace or a bounding set. All
# of these are inherited: containers would have them too, or the node would not see what pods mount.
REACH_CONTAINERS = (
    *("NoNewPrivileges", "LockPersonality", "RestrictRealtime", "RestrictSUIDSGID", "RestrictNamespaces"),
    *("SystemCallFilter", "SystemCallArchitectures", "RestrictAddressFamilies", "MemoryDenyWriteExecute"),
    *("ProtectClock", "ProtectHostname", "ProtectKernelLogs", "ProtectKernelModules", "ProtectKernelTunables"),
    *("ProtectSystem", "ProtectHome", "ProtectProc", "ProtectControlGroups", "PrivateTmp", "PrivateDevices"),
    *("PrivateMounts", "ReadOnlyPaths", "RootDirectory", "CapabilityBoundingSet", "DeviceAllow", "PrivateNetwork"),
)


def settings() -> dict[str, str]:
    lines = [line for line in UNIT.read_text().splitlines() if "=" in line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


@pytest.fixture
def systemd_analyze() -> str:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("needs systemd-analyze")
    return program


def test_systemd_understands_every_line_of_the_unit(systemd_analyze: str, tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace(settings()["ExecStart"], "/bin/true serve"))
    done = subprocess.run([systemd_analyze, "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_agent_has_private_files_no_core_dumps_and_a_memory_limit() -> None:
    found = settings()
    assert (found["UMask"], found["LimitCORE"], found["OOMScoreAdjust"]) == ("0077", "0", "-999")
    assert found["MemoryMax"] == "4G"
    assert int(found["LogRateLimitBurst"]) > 0
    # If one process is killed for its memory, the others of the service, which are containers' monitors, must not end.
    assert (found["OOMPolicy"], found["KillMode"]) == ("continue", "process")


@pytest.mark.parametrize("name", REACH_CONTAINERS)
def test_the_unit_has_no_setting_that_would_reach_containers(name: str) -> None:
    assert settings().get(name, "no") == "no"
    assert name in UNIT.read_text(), f"the unit says of {name} neither that it is off nor why"


def test_the_unit_explains_every_serious_finding_of_systemd(systemd_analyze: str) -> None:
    command = [systemd_analyze, "security", "--offline=true", "--json=short", str(UNIT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    findings = [entry for entry in json.loads(done.stdout) if not entry["set"] and entry["exposure"] is not None]
    serious = {
        entry["name"].partition("=")[0].partition("/")[0] for entry in findings if float(entry["exposure"]) >= 0.2
    }
    assert serious, "systemd-analyze lists nothing: its output is read wrongly"
    text = UNIT.read_text()
    assert sorted(name for name in serious if name not in text) == []


def test_the_agent_dumps_no_core_and_containers_may(agent: AgentProcess, attacker: StartAttacker) -> None:
    soft, hard = resource.prlimit(agent.pid(), resource.RLIMIT_CORE)
    assert soft == 0
    ours = attacker(like_kubelets("main"))
    expected = "unlimited" if hard == resource.RLIM_INFINITY else str(hard // 512)
    assert ours.shell("ulimit -c; ulimit -Hc").split() == [expected, expected]
    assert agent.client.output(ours.container_id, "sh", "-c", "ulimit -Sc").strip() == expected
