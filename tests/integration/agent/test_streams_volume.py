"""Much through one command in both directions at once, for clients that now and then do not read."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from tests.integration.agent.streams import Running, exit_code, resident, run, spdy
from tests.integration.streaming.websocket_client import WebSocketClient
from tests.support.agent import PATIENCE, AgentProcess

if os.geteuid() != 0:
    pytest.skip("needs root", allow_module_level=True)

MIB = 1 << 20
# PODKEEL_STREAM_MIB=1024 is what is promised; a part of it shows as well whether anything grows with what is sent.
VOLUME = int(os.environ.get("PODKEEL_STREAM_MIB", "128")) * MIB
SECONDS = PATIENCE * 10 + VOLUME / (8 * MIB)
CHUNK = os.urandom(256 * 1024)


class Growth:
    """The most memory an agent has had since, beyond what it had (proc(5), clear_refs and VmHWM)."""

    def __init__(self, agent: AgentProcess) -> None:
        self._status = Path(f"/proc/{agent.pid()}/status")
        self._before = resident(agent.pid())
        Path(f"/proc/{agent.pid()}/clear_refs").write_text("5")

    def bytes(self) -> int:
        lines = self._status.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")) - self._before


@pytest.fixture
def container(agent: AgentProcess) -> Running:
    return run(agent)


async def without_reading(reading: asyncio.Event, sending: asyncio.Task[None]) -> None:
    """Read nothing for as long as it takes until nothing moves any more, and a while beyond."""
    reading.clear()
    await asyncio.sleep(0.7)
    assert not sending.done()
    reading.set()


@pytest.mark.parametrize("keeps_windows", [False, True])
async def test_over_spdy(container: Running, keeps_windows: bool) -> None:
    growth = Growth(container.agent)
    url = container.exec_url("cat", streams="stdin stdout")
    async with spdy(url, "stdin", "stdout", keeps_windows=keeps_windows) as (client, ids):
        stdout = client.streams[ids["stdout"]]
        stdout.keep = False

        async def send() -> None:
            for _ in range(VOLUME // len(CHUNK)):
                await client.send(ids["stdin"], CHUNK)
            await client.send(ids["stdin"], b"", fin=True)

        sending = asyncio.create_task(send())
        await without_reading(client.reading, sending)
        await asyncio.wait_for(asyncio.gather(stdout.ended.wait(), sending), SECONDS)
        assert stdout.size == VOLUME
        assert exit_code(await client.status(ids["error"])) == 0
    assert growth.bytes() < 16 * MIB


async def test_over_websocket(container: Running) -> None:
    growth = Growth(container.agent)
    client = await WebSocketClient.connect(container.exec_url("cat", streams="stdin stdout"), "v5.channel.k8s.io")
    client.keep = False

    async def send() -> None:
        for _ in range(VOLUME // len(CHUNK)):
            client.send(0, CHUNK)
            await client.writer.drain()
        client.send(255, bytes([0]))

    sending = asyncio.create_task(send())
    await without_reading(client.reading, sending)
    await asyncio.wait_for(sending, SECONDS)
    assert exit_code(await client.status()) == 0
    assert client.size - len(client.channels[3]) == VOLUME
    await client.close()
    assert growth.bytes() < 16 * MIB
