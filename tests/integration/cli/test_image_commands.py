"""``podkeel pull`` and ``podkeel image …`` against a real agent and a real registry."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from proto.podkeel.v1 import agent_pb2
from tests.support.agent import BUSYBOX, SOON, AgentProcess
from tests.support.image_builder import BuiltImage, entry, make_tar
from tests.support.pods import run_container
from tests.support.registry import Registry, run_registry
from tests.support.registry_front import Front, run_front


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with run_registry() as running:
        yield running


@pytest.fixture
async def front(registry: Registry) -> AsyncIterator[Front]:
    built = BuiltImage(tuple(make_tar([entry(name, os.urandom(200_000))]) for name in "abc"))
    registry.push(built, "team/app", "1")
    async with run_front(registry.host) as running:
        yield running


class Command:
    """A ``podkeel`` client in a separate process; ``terminal`` gives it one for its standard error."""

    def __init__(self, agent: AgentProcess) -> None:
        self._environment = {**os.environ, "PODKEEL_SOCKET": agent.address, "COLUMNS": "100", "LINES": "30"}

    async def start(self, *words: str, stderr: int = asyncio.subprocess.PIPE) -> asyncio.subprocess.Process:
        program = str(Path(sys.executable).with_name("podkeel"))
        return await asyncio.create_subprocess_exec(
            program, *words, env=self._environment, stdout=asyncio.subprocess.PIPE, stderr=stderr
        )

    async def run(self, *words: str) -> tuple[int, str, str]:
        process = await self.start(*words)
        out, err = await process.communicate()
        return process.returncode or 0, out.decode(), err.decode()


@pytest.fixture
def podkeel(agent: AgentProcess) -> Command:
    return Command(agent)


async def image_id(podkeel: Command, reference: str) -> str:
    _, out, _ = await podkeel.run("image", "inspect", reference)
    return out.partition('"id": "')[2].partition('"')[0]


async def test_a_pull_shows_its_layers(podkeel: Command, front: Front) -> None:
    name = f"{front.host}/team/app:1"
    status, out, err = await podkeel.run("pull", name)
    assert (status, out.strip()) == (0, await image_id(podkeel, name))
    assert err == "" or err.splitlines()[-1].endswith(" of 3)")
    await podkeel.run("image", "rm", name)
    ours, theirs = pty.openpty()
    front.trickle = 2_000
    process = await podkeel.start("pull", name, stderr=theirs)
    os.close(theirs)
    with closing(os.fdopen(ours, "rb", buffering=0)) as terminal:
        drawn = await asyncio.to_thread(read_all, terminal.fileno())
    out_bytes, _ = await process.communicate()
    assert out_bytes.startswith(b"sha256:")
    assert "\x1b[1A" in drawn, "each drawing replaces the one before"
    assert "━" in drawn
    assert "/s, " in drawn
    assert "3 of 3 layers" in drawn.splitlines()[-2], "the last drawing stays"
    status, out, err = await podkeel.run("pull", f"{front.host}/team/absent")
    assert (status, out) == (1, "")
    assert "team/absent" in err
    await podkeel.run("image", "rm", name)


def read_all(descriptor: int) -> str:
    content = b""
    while True:
        try:
            chunk = os.read(descriptor, 65536)
        except OSError:  # how a terminal says that the other side is closed
            chunk = b""
        if not chunk:
            return content.decode()
        content += chunk


async def test_a_pull_whose_client_leaves_ends_at_once(podkeel: Command, agent: AgentProcess, front: Front) -> None:
    front.hold_after(0)
    process = await podkeel.start("pull", f"{front.host}/team/app:1")

    await until(agent, lambda pulls: any(layer.received for pull in pulls for layer in pull.layers))
    _, out, _ = await podkeel.run("image", "pulls")
    assert f"{front.host}/team/app:1  0 of 3" in out
    process.send_signal(signal.SIGINT)
    assert await process.wait() == 130
    async with asyncio.timeout(SOON):
        await front.left.wait()
    await until(agent, lambda pulls: not pulls)


async def until(agent: AgentProcess, good: Callable[[Sequence[agent_pb2.PullProgress]], bool]) -> None:
    """Wait until the agent's running pulls are as wanted."""
    async with asyncio.timeout(SOON):
        while True:
            answer = await asyncio.to_thread(agent.client.call, "ListPulls", agent_pb2.ListPullsRequest())
            if good(answer.pulls):
                return
            await asyncio.sleep(0.01)


async def test_explain(podkeel: Command, front: Front) -> None:
    status, out, _ = await podkeel.run("image", "explain", f"{front.host}/team/app:1")
    assert status == 0
    assert f"✓ http://{front.host}/v2" in out
    front.token_user = "user:secret"
    status, out, _ = await podkeel.run("image", "explain", f"{front.host}/team/app:1", "--creds", "user:wrong")
    assert status == 1
    assert "user user, from the request" in out
    assert "wrong" not in out


async def test_prune(podkeel: Command, agent: AgentProcess, registry: Registry, front: Front) -> None:
    sandbox_id, _ = run_container(agent, "sleep", "1000")
    name = f"{front.host}/team/app:1"
    await podkeel.run("pull", name)
    old = (await image_id(podkeel, name))[7:20]
    registry.push(BuiltImage((make_tar([entry("new", "new")]),)), "team/app", "1")
    await podkeel.run("pull", name)
    status, out, _ = await podkeel.run("image", "prune", "--all", "--dry-run")
    assert (status, f"{name}  " in out, old in out) == (0, True, True)
    assert BUSYBOX not in out, "a container uses it"
    status, out, _ = await podkeel.run("image", "prune", "-f")
    assert (status, f"{old} removed" in out) == (0, True)
    assert out.splitlines()[-1] == "1 image removed, 1.16 MiB freed"
    assert old not in (await podkeel.run("images"))[1]
    assert name in (await podkeel.run("images"))[1], "it has a tag"
    await podkeel.run("image", "rm", name)
    await podkeel.run("rm", sandbox_id)


async def test_verify_without_a_policy(podkeel: Command, front: Front) -> None:
    status, out, _ = await podkeel.run("image", "verify", f"{front.host}/team/app:1", "--creds", "user:secret")
    assert status == 0
    assert f"{front.host}/team/app:1  sha256:" in out
    assert "no policy (images.signature_policy): every image is accepted" in out


async def test_tag_export_push_and_usage(podkeel: Command, registry: Registry, front: Front, tmp_path: Path) -> None:
    name = f"{registry.host}/team/app:1"
    await podkeel.run("pull", name)
    assert await podkeel.run("image", "tag", name, "localhost/mine") == (0, "localhost/mine:latest\n", "")
    archive = tmp_path / "mine.tar"
    status, out, _ = await podkeel.run("image", "export", str(archive), "localhost/mine")
    assert (status, out.split()[0]) == (0, str(archive))
    status, out, _ = await podkeel.run("image", "push", "localhost/mine", f"{registry.host}/mine:2")
    assert out.startswith(f"{registry.host}/mine:2@sha256:")
    assert "0 blobs sent, 4 mounted" in out
    status, out, _ = await podkeel.run("image", "df")
    assert {"docker.io/library/busybox:latest", name} == {line.split()[0] for line in out.splitlines()[1:3]}
    assert "images without containers alone hold" in out
    await podkeel.run("image", "rm", name)
    status, out, _ = await podkeel.run("image", "import", str(archive))
    assert out.startswith("localhost/mine:latest")
    assert (await podkeel.run("image", "rm", "localhost/mine"))[0] == 0
    status, _, err = await podkeel.run("image", "push", "localhost/mine")
    assert status == 1
    assert "not on this node" in err


async def test_check_and_repair(podkeel: Command, agent: AgentProcess, front: Front) -> None:
    name = f"{front.host}/team/app:1"
    await podkeel.run("pull", name)
    status, out, _ = await podkeel.run("image", "check")
    assert (status, out) == (0, "2 images, 4 layers: nothing broken\n")
    (file,) = agent.data.glob("layers/*/fs/a")
    file.unlink()
    status, out, _ = await podkeel.run("image", "check")
    assert status == 1
    assert "/a is missing" in out
    assert out.splitlines()[-1] == "2 images, 4 layers: 1 broken"
    status, out, _ = await podkeel.run("image", "check", "--repair")
    assert status == 0
    assert f"of {name}; removed with its images: pull them again" in out
    assert await image_id(podkeel, name) == ""
