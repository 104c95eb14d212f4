from __future__ import annotations

import json
import subprocess
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT

import msgspec
import pytest

from cri.config.configuration import Configuration
from cri.host_check import Check, run_check
from runtime.options import DEFAULT_HANDLERS, HandlerOptions, RuntimeOptions
from tests.support.agent import AgentProcess


def checked(folder: Path, **options: object) -> dict[str, Check]:
    folders = {"data_dir": str(folder / "data"), "run_dir": str(folder / "run")}
    runtime = msgspec.structs.replace(RuntimeOptions(), **folders, **options)
    found = {check.name: check for check in run_check(Configuration(runtime=runtime))}
    assert list(folder.iterdir()) == []
    return found


def test_every_check_passes_on_this_node(tmp_path: Path) -> None:
    found = checked(tmp_path)
    for name in (
        "conmon",
        "catatonit",
        "nft",
        "libseccomp",
        "cgroups",
        "overlay",
        "bridge and veth",
        "nftables",
        "kernel",
    ):
        assert found[name].state == "ok", found[name]
    runtimes = [found[f"runtime {name}"] for name in ("crun", "runc")]
    # Older ones work too, with the agent looking after working directories for them.
    working = [one for one in runtimes if one.state == "ok" or "the agent does so for it" in one.detail]
    assert working
    assert ", the default" in working[0].detail


def test_what_is_missing_is_named_with_its_remedy(tmp_path: Path) -> None:
    broken = tmp_path.parent / "broken"
    broken.write_text("#!/bin/sh\necho it is broken >&2; exit 1\n")
    broken.chmod(0o755)
    handlers = {**DEFAULT_HANDLERS, "absent": HandlerOptions(path="absent"), "broken": HandlerOptions(path=str(broken))}
    found = checked(tmp_path, conmon_path="/nonexistent/conmon", handlers=handlers)
    assert found["conmon"].state == "fail"
    assert "/nonexistent/conmon" in found["conmon"].detail
    assert found["conmon"].remedy == "apt-get install conmon"
    assert (found["runtime absent"].state, found["runtime absent"].remedy) == ("warn", "apt-get install absent")
    assert found["runtime broken"].state == "warn"
    assert "it is broken" in found["runtime broken"].detail


def test_a_default_runtime_that_does_not_work_fails(tmp_path: Path) -> None:
    found = checked(tmp_path, default_runtime="absent", handlers={"absent": HandlerOptions(path="absent")})
    assert found["runtime absent"].state == "fail"
    assert found["runtime absent"].detail.endswith(", the default")


def test_no_cgroup_driver_of_that_name(tmp_path: Path) -> None:
    assert checked(tmp_path, cgroup_driver="none")["cgroups"].state == "fail"


def as_nobody(agent: AgentProcess, *words: str) -> tuple[int, str]:
    """The status and output of a command of an unprivileged user."""
    prefix = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
    if subprocess.run([*prefix, *agent.command("--help")], stdout=DEVNULL, stderr=DEVNULL, check=False).returncode != 0:
        pytest.skip("the environment of these tests is closed to nobody")
    done = subprocess.run([*prefix, *agent.command(*words)], stdout=PIPE, stderr=STDOUT, text=True, check=False)
    return done.returncode, done.stdout


@pytest.mark.parametrize("command", [("serve",), ("reset", "--yes")])
def test_commands_that_need_root_are_refused_without_it(agent: AgentProcess, command: tuple[str, ...]) -> None:
    status, output = as_nobody(agent, *command)
    assert (status, output.count("\n")) == (1, 1)
    assert output.startswith(f"podkeel: podkeel {command[0]} needs root, and this is user ")


def test_everyone_may_check_what_takes_no_root(agent: AgentProcess) -> None:
    status, output = as_nobody(agent, "check", "--format", "json", "--run-dir", str(agent.run))
    found = {check["name"]: check for check in json.loads(output)["checks"]}
    assert status == 1
    assert found["root"]["remedy"] == found["agent"]["remedy"] == "run it as root"
    assert found["conmon"]["state"] == "ok"


def test_clients_without_access_to_the_socket_get_an_error(agent: AgentProcess) -> None:
    status, output = as_nobody(agent, "ps", "--socket", agent.address)
    assert status == 1
    assert output.startswith(f"podkeel: {agent.address} is closed to user ")
    assert output.endswith(": run this command as root\n")
