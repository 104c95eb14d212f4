"""Everything that a container wrote is removed with it, and never prevents the removal of other files."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from host.files import mounts
from proto.podkeel.v1 import agent_pb2
from proto.runtime.v1 import cri_pb2
from tests.integration.agent.hardening import like_kubelets, with_python
from tests.security.conftest import StartAttacker
from tests.support.agent import AgentProcess, wait_for
from tests.support.image_builder import BuiltImage, entry, make_tar
from tests.support.pods import run_container

_NESTING = """
os.chdir("/")
for _ in range({levels}):
    os.mkdir("{name}")
    os.chdir("{name}")
for number in range({files}):
    open(f"file{{number}}", "w").close()
os.close(os.open(b"not utf-8 \\xff", os.O_CREAT))
answer("done")
"""


def trash(agent: AgentProcess) -> list[Path]:
    return list((agent.data / "trash").iterdir())


def remove_and_wait(agent: AgentProcess, sandbox_id: str) -> None:
    agent.client.remove_sandbox(sandbox_id)
    wait_for(lambda: not trash(agent), seconds=30, what="an empty trash")


@pytest.mark.parametrize(
    ("levels", "name", "files"), [(17, "n" * 250, 1), (17, "n" * 250, 100), (1000, "d", 1)], ids=["17", "large", "1000"]
)
def test_deeply_nested_folders_are_removed(
    agent: AgentProcess, attacker: StartAttacker, levels: int, name: str, files: int
) -> None:
    ours = attacker(with_python(like_kubelets("main")))
    assert ours.python(_NESTING.format(levels=levels, name=name, files=files)) == "done"
    remove_and_wait(agent, ours.sandbox_id)


def test_a_file_that_cannot_be_removed_is_logged_once_and_delays_nothing(agent: AgentProcess) -> None:
    """An unknown mount in a container's files keeps only its folder from being removed."""
    before = agent.log.stat().st_size
    sandbox_id, container_id = run_container(agent, "sh", "-c", "mkdir /held; touch /held/a /b; sleep 1000")
    wait_for((agent.data / "containers" / container_id / "upper/b").exists, what="the file")
    held = agent.data / "containers" / container_id / "upper/held"
    mounts.bind(held, held)
    try:
        agent.client.remove_sandbox(sandbox_id)
        for _ in range(2):
            other, _ = run_container(agent, "sh", "-c", "touch /c; sleep 1000")
            agent.client.remove_sandbox(other)
        wait_for(lambda: len(trash(agent)) == 1, what="all but one gone")
        (left,) = trash(agent)
        wait_for(lambda: [path.name for path in left.rglob("*")] == ["upper", "held", "a"], what="the rest gone")
        log = agent.log.read_bytes()[before:].decode()
        assert log.count("upper/held: something is mounted on it") == 1
    finally:
        for target in mounts.mounts_below(agent.data):
            mounts.unmount(target)
    other, _ = run_container(agent, "sleep", "1000")
    remove_and_wait(agent, other)


def test_immutable_files_of_a_container_are_removed(agent: AgentProcess) -> None:
    sandbox_id, container_id = run_container(agent, "sh", "-c", "mkdir /d; touch /d/immutable /b; sleep 1000")
    upper = agent.data / "containers" / container_id / "upper"
    wait_for((upper / "b").exists, what="the file")
    if subprocess.run(["chattr", "+i", upper / "d/immutable", upper / "d"], check=False).returncode:
        pytest.skip("the file system of the data folder has no immutable flag")
    remove_and_wait(agent, sandbox_id)


def test_an_image_with_the_longest_path_leaves_nothing(agent: AgentProcess, tmp_path: Path) -> None:
    """An absolute path in the data folder is then longer than the kernel accepts."""
    long = "/".join(["p" * 250] * 16)[:4050]
    BuiltImage((make_tar([entry(f"{long}/f", "x"), entry("g", "y")]),), {}).write_docker(tmp_path / "i.tar", "long:1")
    request = agent_pb2.ImportImageRequest(path=str(tmp_path / "i.tar"), reference="long:1")
    agent.client.call("ImportImage", request)
    agent.client.call("RemoveImage", cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image="long:1")))
    wait_for(lambda: not trash(agent), seconds=30, what="an empty trash")
