"""Back-pressure: who reads slowly slows the process, and memory stays bounded in both directions."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from cri.streaming.server import StreamingServer
from tests.integration.streaming.conftest import Connect
from tests.integration.streaming.local_backend import LocalBackend
from tests.support.agent import SOON

MIB = 1 << 20
# 1 GiB by hand; the suite takes a sixteenth of it, which is as many times the bound.
VOLUME = int(os.environ.get("PODKEEL_STREAM_MIB", "64")) * MIB


def zeros(count: int) -> list[str]:
    return ["head", "-c", str(count), "/dev/zero"]


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("keeps_windows", [False, True])
async def test_both_directions_at_once(server: StreamingServer, connect: Connect, keeps_windows: bool) -> None:
    url = server.exec_url("c", ["cat"], tty=False, stdin=True, stdout=True, stderr=False)
    client = await connect(url, keeps_windows=keeps_windows)
    ids = await client.open_command("stdin", "stdout")
    stdout = client.streams[ids["stdout"]]
    stdout.keep = False
    chunk = os.urandom(256 * 1024)
    before = peak = resident()
    for _ in range(0, VOLUME, len(chunk)):
        await client.send(ids["stdin"], chunk)
        peak = max(peak, resident())
    await client.send(ids["stdin"], b"", fin=True)
    async with asyncio.timeout(SOON):
        assert (await client.status(ids["error"]))["status"] == "Success"
    assert stdout.size == VOLUME
    assert peak - before < 16 * MIB


async def test_a_slow_reader_slows_the_process(server: StreamingServer, connect: Connect, tmp_path: Path) -> None:
    script = f"while :; do head -c 1000000 /dev/zero; echo >> {tmp_path}/written; done"
    url = server.exec_url("c", ["sh", "-c", script], tty=False, stdin=False, stdout=True, stderr=False)
    client = await connect(url)
    await client.open_command("stdout")
    client.reading.clear()
    before = resident()
    written = tmp_path / "written"
    sizes = []
    for _ in range(25):
        await asyncio.sleep(0.1)
        sizes.append(written.stat().st_size if written.exists() else 0)
    assert sizes[-1] == sizes[-5], "the process keeps writing"
    assert sizes[-1] < 30
    assert resident() - before < 16 * MIB


async def test_a_stalled_process_holds_the_client_back(
    server: StreamingServer, connect: Connect, backend: LocalBackend
) -> None:
    url = server.exec_url("c", ["sleep", "1000"], tty=False, stdin=True, stdout=True, stderr=False)
    client = await connect(url)
    ids = await client.open_command("stdin", "stdout")
    before = resident()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            for _ in range(1000):
                await client.send(ids["stdin"], bytes(MIB))
    assert resident() - before < 16 * MIB


async def test_a_client_that_keeps_windows_is_never_overrun(server: StreamingServer, connect: Connect) -> None:
    url = server.exec_url(
        "c", ["head", "-c", "1000000", "/dev/zero"], tty=False, stdin=False, stdout=True, stderr=False
    )
    client = await connect(url, keeps_windows=True)
    ids = await client.open_command("stdout")
    stdout = client.streams[ids["stdout"]]
    client.keeps_windows = False
    client.session.consumed(ids["stdout"], 0)
    await asyncio.wait_for(stdout.arrived.wait(), SOON)
    granted = 65536
    for _ in range(3):
        await asyncio.sleep(0.2)
        assert stdout.size == granted
        client.session.consumed(ids["stdout"], 65536)
        client.flush()
        granted += 65536
    await asyncio.sleep(0.2)
    assert stdout.size == granted


async def test_a_slow_reader_gets_the_last_bytes(server: StreamingServer, connect: Connect) -> None:
    url = server.exec_url(
        "c", ["head", "-c", "3000000", "/dev/zero"], tty=False, stdin=False, stdout=True, stderr=False
    )
    client = await connect(url)
    ids = await client.open_command("stdout")
    client.session.ping()
    client.reading.clear()
    await asyncio.sleep(0.5)
    client.session.ping()
    client.flush()
    await asyncio.sleep(0.2)
    client.reading.set()
    assert (await client.status(ids["error"]))["status"] == "Success"
    assert client.streams[ids["stdout"]].size == 3_000_000
