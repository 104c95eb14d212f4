"""OCI hooks of the node: run by the OCI runtime at their stages, read again when they change, named when wrong."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.conformance.support import SLEEP, Pod
from tests.support.agent import AgentProcess, running_agent, wait_for
from tests.support.pods import container_config, remove_all_pods, sandbox_config

STAGES = ("prestart", "createRuntime", "createContainer", "poststart", "poststop")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("hooks")
    usr, etc = folder / "usr", folder / "etc"
    usr.mkdir()
    etc.mkdir()
    return usr, etc


@pytest.fixture(scope="module")
def hooked(
    tmp_path_factory: pytest.TempPathFactory, busybox: Path, folders: tuple[Path, Path]
) -> Iterator[AgentProcess]:
    """An agent with separate folders of hooks."""
    options = f"hooks_dirs = {json.dumps([str(folder) for folder in folders])}"
    with running_agent(tmp_path_factory.mktemp("agent"), busybox, options=options) as agent:
        yield agent


@pytest.fixture
def agent(hooked: AgentProcess, folders: tuple[Path, Path]) -> Iterator[AgentProcess]:
    yield hooked
    remove_all_pods(hooked.client)
    for folder in folders:
        for file in folder.iterdir():
            file.unlink()


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """Writes the state that it is given to a file named after its argument and the container."""
    program = tmp_path / "hook"
    program.write_text(
        f'#!/bin/sh\nstate=$(cat)\nid=${{state#*\'"id":\'}}\nid=$(echo "$id" | tr -d \' "\' | cut -c1-64)\n'
        f'echo "$WORD" > {tmp_path}/$1-$id\n'
    )
    program.chmod(0o755)
    return program


def write(folder: Path, program: Path, name: str = "10-test.json", **fields: Any) -> None:
    content: dict[str, Any] = {
        "version": "1.0.0",
        "when": {"annotations": {"^hook\\.test/on$": "^yes$"}},
        "stages": ["createRuntime"],
        "hook": {"path": str(program), "args": ["hook", "made"], "env": ["WORD=first", "PATH=/usr/bin:/bin"]},
    }
    (folder / name).write_text(json.dumps({**content, **fields}))


def annotated(value: str = "yes") -> cri_pb2.ContainerConfig:
    config = container_config("main", *SLEEP)
    config.annotations["hook.test/on"] = value
    return config


@pytest.mark.parametrize("handler", ["crun", "runc"])
def test_hooks_run_at_their_stages(
    agent: AgentProcess, handler: str, folders: tuple[Path, Path], program: Path, tmp_path: Path
) -> None:
    for stage in STAGES:
        hook = {"path": str(program), "args": ["hook", stage], "env": ["WORD=first", "PATH=/usr/bin:/bin"]}
        write(folders[0], program, f"{stage}.json", stages=[stage], hook=hook)
    sandbox = sandbox_config(agent)
    sandbox.annotations["hook.test/on"] = "yes"
    pod = Pod(agent, sandbox, agent.client.run_sandbox(sandbox, handler))
    container_id = pod.create(container_config("main", *SLEEP))
    before_start = {path.name.partition("-")[0] for path in tmp_path.glob(f"*-{container_id}")}
    before_start.discard("poststart")  # which runc (1.1) runs at its create
    assert before_start == {"prestart", "createRuntime", "createContainer"}
    agent.client.start(container_id)
    wait_for((tmp_path / f"poststart-{container_id}").exists)
    agent.client.call("RemoveContainer", cri_pb2.RemoveContainerRequest(container_id=container_id))
    assert (tmp_path / f"poststop-{container_id}").read_text() == "first\n"


def test_a_changed_file_counts_for_the_next_container(
    agent: AgentProcess, folders: tuple[Path, Path], program: Path, tmp_path: Path
) -> None:
    pod = Pod.run(agent, sandbox_config(agent))
    write(folders[0], program)
    first = pod.create(annotated())
    assert (tmp_path / f"made-{first}").read_text() == "first\n"
    hook = {"path": str(program), "args": ["hook", "made"], "env": ["WORD=second", "PATH=/usr/bin:/bin"]}
    write(folders[1], program, hook=hook)
    config = annotated()
    config.metadata.attempt = 1
    second = pod.create(config)
    assert (tmp_path / f"made-{second}").read_text() == "second\n"
    config = annotated("no")
    config.metadata.attempt = 2
    third = pod.create(config)
    assert not (tmp_path / f"made-{third}").exists()


def test_a_hook_that_fails_undoes_the_container(agent: AgentProcess, folders: tuple[Path, Path], program: Path) -> None:
    write(folders[0], program, hook={"path": "/bin/false"})
    pod = Pod.run(agent, sandbox_config(agent))
    with pytest.raises(Exception, match="hook"):
        pod.create(annotated())
    assert not agent.client.call("ListContainers", cri_pb2.ListContainersRequest()).containers
    (folders[0] / "10-test.json").unlink()
    pod.create(annotated())


def test_a_wrong_file_is_named(agent: AgentProcess, folders: tuple[Path, Path], program: Path, tmp_path: Path) -> None:
    write(folders[0], program)
    write(folders[0], program, "20-wrong.json", stages=["never"])
    container_id = Pod.run(agent, sandbox_config(agent)).create(annotated())
    assert (tmp_path / f"made-{container_id}").exists()
    status = agent.client.call("Status", cri_pb2.StatusRequest(verbose=True))
    failed = json.loads(status.info["podkeel"])["failedHooks"]
    assert list(failed) == [str(folders[0] / "20-wrong.json")]
    assert "never" in failed[str(folders[0] / "20-wrong.json")]
    assert f"OCI hook {folders[0] / '20-wrong.json'}: left out" in agent.log.read_text()
    command = agent.command("check", "--config", str(agent.folder / "config.toml"))
    checked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert f"{folders[0] / '20-wrong.json'} is left out" in checked.stdout
