"""Attach streams to containers of a real agent."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.agent.streams import Running, arrives, resident, resize, run, spdy
from tests.integration.streaming.websocket_client import WebSocketClient
from tests.support.agent import SOON, AgentProcess
from tests.support.pods import log_lines, wait_for_log
from tests.support.waiting import until

if os.geteuid() != 0:
    pytest.skip("needs root", allow_module_level=True)

TICKS = ("sh", "-c", "echo early; while :; do echo tick; echo tock >&2; sleep 0.05; done")


def log_path(container: Running) -> Path:
    return Path(container.agent.client.status(container.id).log_path)


@pytest.mark.parametrize("handler", ["crun", "runc"])
async def test_several_clients_see_what_comes_from_now_on(agent: AgentProcess, handler: str) -> None:
    container = run(agent, *TICKS, handler=handler)
    wait_for_log(agent.client, container.id, "early")
    async with (
        spdy(container.attach_url(), "stdout", "stderr") as (first, ids),
        spdy(container.attach_url("stdout"), "stdout") as (second, other_ids),
    ):
        await arrives(first, ids["stdout"], b"tick\ntick\n")
        await arrives(first, ids["stderr"], b"tock\ntock\n")
        await arrives(second, other_ids["stdout"], b"tick\n")
        second.writer.transport.abort()
        await arrives(first, ids["stdout"], b"tick\n" * 4)
        await asyncio.to_thread(agent.client.stop, container.id)
        assert await first.status(ids["error"]) == {"status": "Success"}
        assert b"early" not in first.streams[ids["stdout"]].data
        await asyncio.wait_for(first.went_away.wait(), SOON)


async def test_websocket_attach(agent: AgentProcess) -> None:
    container = run(agent, *TICKS)
    client = await WebSocketClient.connect(container.attach_url(), "v5.channel.k8s.io")
    await client.until(lambda: b"tick" in client.channels.get(1, b"") and b"tock" in client.channels.get(2, b""))
    await asyncio.to_thread(agent.client.stop, container.id)
    assert (await client.status())["status"] == "Success"
    await client.close()


async def test_input_is_for_each_client_and_stays_open(agent: AgentProcess) -> None:
    container = run(agent, "sh", "-c", "while read line; do echo got $line; done; echo ended", stdin=True)
    for word in (b"one", b"two"):
        async with spdy(container.attach_url("stdin stdout"), "stdin", "stdout") as (client, ids):
            await client.send(ids["stdin"], word + b"\n", fin=True)
            await arrives(client, ids["stdout"], b"got " + word + b"\n")
    assert agent.client.status(container.id).state == cri_pb2.CONTAINER_RUNNING
    assert log_lines(log_path(container)) == ["got one", "got two"]


async def test_input_that_is_read_once_ends_with_its_client(agent: AgentProcess) -> None:
    container = run(agent, "sh", "-c", "cat; echo ended", stdin=True, stdin_once=True)
    async with spdy(container.attach_url("stdin stdout"), "stdin", "stdout") as (client, ids):
        payload = os.urandom(50_000).hex().encode() + b"\n"
        await client.send(ids["stdin"], payload, fin=True)
        assert await client.streams[ids["stdout"]].text() == payload.decode() + "ended\n"
        assert await client.status(ids["error"]) == {"status": "Success"}
    await until(lambda: agent.client.status(container.id).state == cri_pb2.CONTAINER_EXITED)


async def test_input_that_is_read_once_ends_when_its_client_goes_away(agent: AgentProcess) -> None:
    container = run(agent, "sh", "-c", "cat; echo ended", stdin=True, stdin_once=True)
    async with spdy(container.attach_url("stdin stdout"), "stdin", "stdout") as (client, ids):
        await client.send(ids["stdin"], b"line\n")
        await arrives(client, ids["stdout"], b"line\n")
        client.writer.transport.abort()
    await until(lambda: agent.client.status(container.id).state == cri_pb2.CONTAINER_EXITED)
    assert log_lines(log_path(container)) == ["line", "ended"]


@pytest.mark.parametrize("handler", ["crun", "runc"])
async def test_terminal_with_resize(agent: AgentProcess, handler: str) -> None:
    script = "trap 'stty size' WINCH; echo ready; while :; do read -t 1 line && echo got $line; done"
    container = run(agent, "sh", "-c", script, handler=handler, tty=True, stdin=True)
    await asyncio.to_thread(wait_for_log, agent.client, container.id)
    async with spdy(container.attach_url("stdin stdout", tty=True), "stdin", "stdout", "resize") as (client, ids):
        resize(client, ids["resize"], 123, 45)
        await arrives(client, ids["stdout"], b"45 123\r\n")
        await client.send(ids["stdin"], b"word\n")
        await arrives(client, ids["stdout"], b"got word\r\n")
    assert agent.client.status(container.id).state == cri_pb2.CONTAINER_RUNNING


# ---- clients that read slowly, or not at all

MIB = 1 << 20
# Waits for a line of input, so that all are attached by then; a line of the log is 1000 characters.
FLOOD = "read go; yes $(printf %0999d 7) | head -c {size}; echo over"


def flooding(agent: AgentProcess, size: int) -> Running:
    return run(agent, "sh", "-c", FLOOD.format(size=size), stdin=True)


def flood_lines(path: Path) -> int:
    """How many lines of the flood a log has, all of them complete and equal, and then the last one."""
    count, text = 0, b""
    with path.open("rb") as log:
        for line in log:
            _, _, tag, part = line.rstrip(b"\n").split(b" ", 3)
            text += part
            if tag == b"P":
                continue
            if text == b"over":
                return count
            assert text == b"0" * 998 + b"7"
            count, text = count + 1, b""
    raise AssertionError("the last line is missing")


@pytest.mark.parametrize("transport", ["spdy", "websocket"])
async def test_a_client_that_does_not_read_stops_neither_container_nor_log_nor_others(
    agent: AgentProcess, transport: str
) -> None:
    size = 100_000_000
    container = flooding(agent, size)
    before = resident(agent.pid())
    async with (
        spdy(container.attach_url("stdin stdout"), "stdin", "stdout") as (reader, ids),
        spdy(container.attach_url("stdout"), "stdout") as (lazy, lazy_ids),
    ):
        web = await WebSocketClient.connect(container.attach_url("stdout"), "v5.channel.k8s.io")
        web.keep = False
        reader.streams[ids["stdout"]].keep = False
        if transport == "spdy":
            lazy.reading.clear()
        else:
            web.reading.clear()
        await reader.send(ids["stdin"], b"go\n")
        await until(lambda: agent.client.status(container.id).state == cri_pb2.CONTAINER_EXITED)
        assert await reader.status(ids["error"]) == {"status": "Success"}
        assert reader.streams[ids["stdout"]].size == size + len("over\n")
        assert flood_lines(log_path(container)) == size // 1000
        assert resident(agent.pid()) - before < 32 * MIB
        if transport == "spdy":
            lazy.reading.set()
            message = (await lazy.status(lazy_ids["error"]))["message"]
            got = lazy.streams[lazy_ids["stdout"]].size
            await asyncio.wait_for(lazy.went_away.wait(), SOON)
        else:
            web.reading.set()
            message = (await web.status())["message"]
            got = web.size
        assert message.startswith("Internal error occurred: error attaching: the client did not read the container's")
        assert got < size
        await web.close()


async def test_a_slow_client_gets_all(agent: AgentProcess) -> None:
    size = 24_000_000
    container = flooding(agent, size)
    async with spdy(container.attach_url("stdin stdout"), "stdin", "stdout", keeps_windows=True) as (client, ids):
        stdout = client.streams[ids["stdout"]]
        await client.send(ids["stdin"], b"go\n")
        while not stdout.ended.is_set():
            # A window at a time: 64 KiB each 5 ms are 13 MB/s, far less than the container can write.
            await asyncio.sleep(0.005)
            client.reading.set()
            await asyncio.sleep(0)
            client.reading.clear()
        client.reading.set()
        assert await client.status(ids["error"]) == {"status": "Success"}
        assert stdout.size == size + len("over\n")


async def test_input_that_the_container_does_not_read_blocks_no_other_call(agent: AgentProcess) -> None:
    container = run(agent, *TICKS, stdin=True)
    async with (
        spdy(container.attach_url("stdin stdout"), "stdin", "stdout") as (writer, ids),
        spdy(container.attach_url("stdout"), "stdout") as (other, other_ids),
    ):
        sending = asyncio.create_task(writer.send(ids["stdin"], bytes(64 * MIB)))
        await arrives(writer, ids["stdout"], b"tick\n" * 10)
        await arrives(other, other_ids["stdout"], b"tick\n" * 10)
        assert not sending.done()
        sending.cancel()
    lines = len(log_lines(log_path(container)))
    await until(lambda: len(log_lines(log_path(container))) > lines + 4)


async def test_an_agent_that_stops_says_so_and_the_container_keeps_running(own_agent: AgentProcess) -> None:
    container = run(own_agent, *TICKS)
    async with spdy(container.attach_url(), "stdout", "stderr") as (client, ids):
        await arrives(client, ids["stdout"], b"tick")
        await asyncio.to_thread(own_agent.stop)
        assert "the node agent is stopping" in (await client.status(ids["error"]))["message"]
    own_agent.start()
    assert own_agent.client.status(container.id).state == cri_pb2.CONTAINER_RUNNING
    async with spdy(container.attach_url(), "stdout", "stderr") as (client, ids):
        await arrives(client, ids["stdout"], b"tick")
