"""Plugins that the agent starts: what they get, and what happens to those that end, hang or are not its own."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from proto.podkeel.v1 import agent_pb2
from tests.support.agent import AgentProcess, wait_for
from tests.support.nri import MANIFESTS

CONFIGURED = """#!{python}
import sys
sys.path.insert(0, "{manifests}")
import stub

class Configured(stub.Plugin):
    def Configure(self, request):
        with open(f"{folder}/{{self.index}}-{{self.name}}.got", "w") as file:
            file.write(request.config)
        return super().Configure(request)

    def RunPodSandbox(self, request):
        return None

Configured("wrong", "99").run()
"""


@contextmanager
def agent_with(folder: Path, seconds: int, plugins: dict[str, str]) -> Iterator[AgentProcess]:
    """An agent that starts these plugins: the texts of their files by name."""
    agent = AgentProcess(folder)
    configuration = folder / "config.toml"
    text = configuration.read_text().replace("[nri]\n", f"[nri]\nregistration_seconds = {seconds}\n")
    configuration.write_text(text)
    (folder / "nri-plugins").mkdir()
    for name, content in plugins.items():
        (folder / "nri-plugins" / name).write_text(content)
        (folder / "nri-plugins" / name).chmod(0o755)
    try:
        agent.start()
        yield agent
        assert agent.tracebacks() == []
    finally:
        agent.reset()


def test_started_plugins_get_their_socket_names_and_configuration(tmp_path: Path) -> None:
    configured = CONFIGURED.format(python=sys.executable, manifests=MANIFESTS, folder=tmp_path)
    conf = tmp_path / "nri-conf.d"
    conf.mkdir()
    (conf / "20-both.conf").write_text("of the full name")
    (conf / "both.conf").write_text("of the name alone")
    (conf / "name.conf").write_text("key: value\n")
    (conf / "35-latin.conf").write_bytes(b"\xff")
    seen = f"env > {tmp_path}/env; readlink /proc/self/fd/3 > {tmp_path}/socket; exit 3"
    plugins = {
        "10-env": f"#!/bin/sh\n{seen}\n",
        "20-both": configured,
        "30-name": configured,
        "35-latin": configured,
        "40-none": configured,
        "50-no-program": "no text of a program",
        "5-wrong": configured,
    }
    with agent_with(tmp_path, 60, plugins) as agent:
        got = {file.stem: file.read_text() for file in tmp_path.glob("*.got")}
        assert got == {"20-both": "of the full name", "30-name": "key: value\n", "40-none": ""}
        lines = (tmp_path / "env").read_text().splitlines()
        assert {"NRI_PLUGIN_NAME=env", "NRI_PLUGIN_IDX=10", "NRI_PLUGIN_SOCKET=3"} <= set(lines)
        assert (tmp_path / "socket").read_text().startswith("socket:")
        log = agent.log.read_text()
        assert "status 3; it is not started again" in log
        assert "35-latin: not started: its configuration cannot be read" in log
        assert "50-no-program: cannot be started" in log or "50-no-program: pid" in log
        assert "5-wrong: not started: its name is not two digits" in log
        plugins_after_a_reload(agent, conf)


def plugins_after_a_reload(agent: AgentProcess, conf: Path) -> None:
    """A reload starts, restarts and ends what changed, and nothing else."""
    folder = agent.folder / "nri-plugins"
    for name in ("10-env", "50-no-program"):  # these have ended
        (folder / name).unlink()
    pids = {name: found for name in ("20-both", "30-name", "40-none") if (found := pids_of(folder / name))}
    (conf / "20-both.conf").write_text("changed")
    (folder / "45-new").write_text((folder / "40-none").read_text())
    (folder / "45-new").chmod(0o755)
    (folder / "30-name").unlink()
    got = list(agent.client.call("Reload", agent_pb2.ReloadRequest()).applied)
    changes = ("20-both: ended", "20-both: started", "30-name: ended", "45-new: started")
    assert got == [f"nri plugin {change}" for change in changes]
    texts = {file.stem: file.read_text() for file in agent.folder.glob("*.got")}
    assert (texts["20-both"], texts["45-new"]) == ("changed", "")
    assert pids_of(folder / "40-none") == pids["40-none"]
    assert pids_of(folder / "30-name") == set()
    assert not pids_of(folder / "20-both") & pids["20-both"]
    assert list(agent.client.call("Reload", agent_pb2.ReloadRequest()).applied) == []


def pids_of(program: Path) -> set[int]:
    """The processes that run this script."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(program).encode() in (process / "cmdline").read_bytes().split(b"\0"):
                found.add(int(process.name))
    return found


def test_a_file_that_others_may_change_is_not_started(tmp_path: Path) -> None:
    folder = tmp_path / "nri-plugins"
    with agent_with(tmp_path, 60, {"10-open": f"#!/bin/sh\ntouch {tmp_path}/ran\n"}) as agent:
        wait_for((tmp_path / "ran").exists)
        (tmp_path / "ran").unlink()
        (folder / "10-open").chmod(0o757)
        agent.restart()
        assert "10-open: not started: users other than root can change it" in agent.log.read_text()
        assert not (tmp_path / "ran").exists()


def test_a_plugin_that_never_registers_delays_the_start_by_its_time_and_is_ended(tmp_path: Path) -> None:
    with agent_with(tmp_path, 1, {"10-hangs": f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 1000\n"}) as agent:
        assert "nri: plugin 10-hangs: not admitted: it did not register within 1 s" in agent.log.read_text()
        process = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}")
        wait_for(lambda: not process.exists(), what="the end of the plugin")
        wait_for(lambda: "did not end after its connection was closed: it is killed" in agent.log.read_text())
