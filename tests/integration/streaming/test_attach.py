"""Attach to containers that a real conmon and a real OCI runtime hold."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cri.streaming.server import StreamingServer
from tests.integration.streaming.conftest import Connect
from tests.integration.streaming.local_backend import LocalBackend
from tests.support.agent import SOON
from tests.support.waiting import until

Start = Callable[..., Awaitable[Path]]


@pytest.fixture
async def start(tmp_path: Path, backend: LocalBackend) -> AsyncIterator[Start]:
    """Start a container whose console the backend then attaches to."""
    names: list[str] = []

    async def run(script: str, *options: str, terminal: bool = False) -> Path:
        names.append(f"pkt-attach-{secrets.token_hex(4)}")
        bundle = make_bundle(tmp_path / names[-1], script, names[-1], terminal=terminal)
        runtime = shutil.which("runc")
        assert runtime is not None
        command = ["conmon", "-c", names[-1], "-u", names[-1], "-r", runtime, "-b", str(bundle), "--full-attach"]
        command += ["--exit-dir", str(bundle), "-p", str(bundle / "pid"), "-l", f"k8s-file:{bundle}/log", *options]
        monitor = await asyncio.create_subprocess_exec(*command, *(["-t"] if terminal else []))
        assert await asyncio.wait_for(monitor.wait(), SOON) == 0
        await until((bundle / "pid").exists)
        backend.attach_folder = bundle
        return bundle

    yield run
    for name in names:
        await (await asyncio.create_subprocess_exec("runc", "delete", "--force", name)).wait()
        await until((tmp_path / name / name).exists)


def make_bundle(bundle: Path, script: str, name: str, *, terminal: bool) -> Path:
    binaries = bundle / "rootfs" / "bin"
    binaries.mkdir(parents=True)
    for folder in ("proc", "dev"):
        (bundle / "rootfs" / folder).mkdir()
    shutil.copy("/bin/busybox", binaries / "busybox")
    for applet in ("sh", "cat", "stty", "sleep"):
        (binaries / applet).symlink_to("busybox")
    kinds = ("pid", "mount", "uts", "ipc", "network")
    config: dict[str, Any] = {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": terminal,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh", "-c", script],
            "env": ["PATH=/bin"],
            "cwd": "/",
        },
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            {
                "destination": "/dev/pts",
                "type": "devpts",
                "source": "devpts",
                "options": ["newinstance", "ptmxmode=0666"],
            },
        ],
        "linux": {"namespaces": [{"type": kind} for kind in kinds], "cgroupsPath": f"/{name}"},
    }
    (bundle / "config.json").write_text(json.dumps(config))
    return bundle


async def begin(bundle: Path) -> None:
    starter = await asyncio.create_subprocess_exec("runc", "start", bundle.name)
    assert await starter.wait() == 0


@asynccontextmanager
async def attached(
    server: StreamingServer, connect: Connect, *, stdin: bool = False, tty: bool = False
) -> AsyncIterator[tuple[Any, dict[str, int]]]:
    client = await connect(server.attach_url("c", stdin=stdin, tty=tty, stdout=True, stderr=not tty))
    names = [*(["stdin"] if stdin else []), "stdout", *(["resize"] if tty else ["stderr"])]
    ids = await client.open_command(*names)
    yield client, ids


async def arrives(client: Any, stream_id: int, text: bytes) -> None:
    stream = client.streams[stream_id]
    async with asyncio.timeout(SOON):
        while text not in stream.data:
            stream.arrived.clear()
            await stream.arrived.wait()


async def test_both_outputs_from_now_on_until_the_container_ends(
    server: StreamingServer, connect: Connect, start: Start
) -> None:
    bundle = await start("echo early; while [ ! -e /later ]; do echo tick; sleep 0.05; done; echo out; echo err >&2")
    await begin(bundle)
    await until(lambda: b"early" in (bundle / "log").read_bytes())
    async with attached(server, connect) as (client, ids), attached(server, connect) as (other, other_ids):
        await arrives(client, ids["stdout"], b"tick\n")
        await arrives(other, other_ids["stdout"], b"tick\n")
        (bundle / "rootfs" / "later").touch()
        assert await client.status(ids["error"]) == {"status": "Success"}
        for output in (client.streams[ids["stdout"]], other.streams[other_ids["stdout"]]):
            assert set((await output.text()).split("\n")) == {"tick", "out", ""}
        assert await client.streams[ids["stderr"]].text() == "err\n"


async def test_input_is_read_once(server: StreamingServer, connect: Connect, start: Start) -> None:
    bundle = await start("cat; echo end", "-i")
    await begin(bundle)
    async with attached(server, connect, stdin=True) as (client, ids):
        payload = os.urandom(100_000).hex().encode() + b"\n"
        await client.send(ids["stdin"], payload, fin=True)
        assert await client.streams[ids["stdout"]].text() == payload.decode() + "end\n"
        assert (await client.status(ids["error"]))["status"] == "Success"


async def test_input_stays_open_and_leaving_leaves_the_container(
    server: StreamingServer, connect: Connect, start: Start
) -> None:
    bundle = await start("while read line; do echo got $line; done", "-i", "--leave-stdin-open")
    await begin(bundle)
    for word in (b"one", b"two"):
        async with attached(server, connect, stdin=True) as (client, ids):
            await client.send(ids["stdin"], word + b"\n", fin=True)
            await arrives(client, ids["stdout"], b"got " + word)
            client.writer.transport.abort()
    assert Path(f"/proc/{(bundle / 'pid').read_text()}").exists()


async def test_terminal_and_resize(server: StreamingServer, connect: Connect, start: Start) -> None:
    bundle = await start("while read line; do stty size; done", "-i", "--leave-stdin-open", terminal=True)
    await begin(bundle)
    async with attached(server, connect, stdin=True, tty=True) as (client, ids):
        client.send_now(ids["resize"], b'{"Width":123,"Height":45}\n')
        typing = asyncio.create_task(type_lines(client, ids["stdin"]))
        await arrives(client, ids["stdout"], b"45 123\r\n")
        typing.cancel()


async def type_lines(client: Any, stdin: int) -> None:
    """conmon takes sizes and input from different places, in no order."""
    while True:
        await client.send(stdin, b"x\n")
        await asyncio.sleep(0.05)


async def test_nothing_to_attach_to(
    server: StreamingServer, connect: Connect, backend: LocalBackend, tmp_path: Path
) -> None:
    backend.attach_folder = tmp_path / "gone"
    async with attached(server, connect) as (client, ids):
        status = await client.status(ids["error"])
        assert status["reason"] == "InternalError"
        assert "is it running?" in status["message"]
