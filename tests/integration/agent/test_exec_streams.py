"""Exec streams into containers of a real agent, with both OCI runtimes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.agent.streams import Running, arrives, exit_code, resize, run, spdy
from tests.integration.streaming.spdy_client import request
from tests.integration.streaming.websocket_client import WebSocketClient
from tests.support.agent import SOON, AgentProcess, running_agent
from tests.support.waiting import until

if os.geteuid() != 0:
    pytest.skip("needs root", allow_module_level=True)

SHELL = ("sh", "-c")


@pytest.fixture(params=["crun", "runc"])
def container(request: pytest.FixtureRequest, agent: AgentProcess) -> Running:
    return run(agent, handler=request.param)


@pytest.fixture
def crun(agent: AgentProcess) -> Running:
    """For what the OCI runtime has no part in."""
    return run(agent)


# ---- without a terminal


async def test_both_outputs_and_success(container: Running) -> None:
    url = container.exec_url(*SHELL, "echo hello; echo oops >&2; hostname")
    async with spdy(url, "stdout", "stderr") as (client, ids):
        assert await client.status(ids["error"]) == {"status": "Success"}
        assert (await client.streams[ids["stdout"]].text()).startswith("hello\npod")
        assert await client.streams[ids["stderr"]].text() == "oops\n"


async def test_input_and_its_end_reach_the_command(container: Running) -> None:
    async with spdy(container.exec_url("cat", streams="stdin stdout"), "stdin", "stdout") as (client, ids):
        await client.send(ids["stdin"], b"abc\n")
        await arrives(client, ids["stdout"], b"abc\n")
        payload = os.urandom(3 << 20)
        await client.send(ids["stdin"], payload, fin=True)
        await client.status(ids["error"])
        await client.streams[ids["stdout"]].ended.wait()
        assert client.streams[ids["stdout"]].data == b"abc\n" + payload


@pytest.mark.parametrize(("script", "code"), [("exit 7", 7), ("kill -9 $$", 137), ("kill -TERM $$", 143)])
async def test_exit_codes_and_signals(container: Running, script: str, code: int) -> None:
    async with spdy(container.exec_url(*SHELL, script), "stdout", "stderr") as (client, ids):
        status = await client.status(ids["error"])
        assert exit_code(status) == code
        assert status["message"] == (
            f"command terminated with non-zero exit code: error executing command [sh -c {script}], exit code {code}"
        )


@pytest.mark.parametrize("program", ["/no/such/thing", "nosuchprogram", "/etc/passwd"])
@pytest.mark.parametrize("tty", [False, True])
async def test_what_cannot_be_executed_is_an_error_that_names_it(container: Running, program: str, tty: bool) -> None:
    names = ("stdout", "resize") if tty else ("stdout", "stderr")
    async with spdy(container.exec_url(program, streams=" ".join(names), tty=tty), *names) as (client, ids):
        status = await client.status(ids["error"])
        assert (status["status"], status["reason"], status["code"]) == ("Failure", "InternalError", 500)
        assert status["message"].startswith("Internal error occurred: error executing command in container: ")
        assert program in status["message"]
        assert await client.streams[ids["stdout"]].text() == ""


async def test_a_child_left_behind_does_not_keep_the_streams(container: Running) -> None:
    async with spdy(container.exec_url(*SHELL, "sleep 999 & echo left"), "stdout", "stderr") as (client, ids):
        assert exit_code(await client.status(ids["error"])) == 0
        assert await client.streams[ids["stdout"]].text() == "left\n"


# ---- on a terminal


async def test_terminal_has_the_clients_size_from_the_start_and_follows_it(container: Running) -> None:
    script = "stty size; read x; stty size; tty; exit 3"
    async with spdy(container.exec_url(*SHELL, script, streams="stdin stdout", tty=True), "stdin", "stdout") as (
        client,
        ids,
    ):
        ids["resize"] = client.session.open_stream({"streamtype": "resize"})
        client.streams[ids["resize"]] = type(client.streams[ids["stdout"]])()
        client.flush()
        resize(client, ids["resize"], 80, 24)
        await arrives(client, ids["stdout"], b"24 80\r\n")
        resize(client, ids["resize"], 132, 50)
        await client.send(ids["stdin"], b"\n")
        assert exit_code(await client.status(ids["error"])) == 3
        text = await client.streams[ids["stdout"]].text()
        assert text == "24 80\r\n\r\n50 132\r\n/dev/pts/0\r\n"


@contextlib.contextmanager
def busy_processors() -> Iterator[None]:
    """Somewhat more work than there are processors, during the block."""
    command = ["sh", "-c", "while :; do :; done"]
    with contextlib.ExitStack() as stack:
        for _ in range((os.cpu_count() or 1) + 1):
            stack.callback(stack.enter_context(subprocess.Popen(command)).kill)
        yield


async def test_short_commands_see_the_first_size(container: Running) -> None:
    """crun sets it after it has started the command, and is preempted in between now and then."""
    seen = []
    with busy_processors():
        for _ in range(50):
            url = container.exec_url("stty", "size", streams="stdout", tty=True)
            async with spdy(url, "stdout", "resize") as (client, ids):
                resize(client, ids["resize"], 80, 24)
                await client.status(ids["error"])
                seen.append(await client.streams[ids["stdout"]].text())
    assert set(seen) == {"24 80\r\n"}


async def test_other_commands_keep_running_meanwhile(crun: Running) -> None:
    """The kernel asks about each program that is executed in the container while a terminal is being made."""
    busy = "i=0; while [ $i -lt 300 ]; do /bin/true || exit 9; i=$((i+1)); done; echo done"
    async with spdy(crun.exec_url(*SHELL, busy), "stdout", "stderr") as (other, its):
        for _ in range(10):
            url = crun.exec_url("stty", "size", streams="stdout", tty=True)
            async with spdy(url, "stdout", "resize") as (client, ids):
                resize(client, ids["resize"], 80, 24)
                assert exit_code(await client.status(ids["error"])) == 0
        assert exit_code(await other.status(its["error"])) == 0
        assert await other.streams[its["stdout"]].text() == "done\n"


async def test_resize_is_a_signal_to_the_program(container: Running) -> None:
    script = "trap 'stty size' WINCH; echo ready; while :; do sleep 0.05; done"
    url = container.exec_url(*SHELL, script, streams="stdin stdout", tty=True)
    async with spdy(url, "stdin", "stdout", "resize") as (client, ids):
        await arrives(client, ids["stdout"], b"ready")
        for width, height in ((100, 30), (101, 31)):
            resize(client, ids["resize"], width, height)
            await arrives(client, ids["stdout"], f"{height} {width}\r\n".encode())


async def test_typed_characters_are_echoed_once_and_control_c_interrupts(container: Running) -> None:
    url = container.exec_url(*SHELL, "echo ready; cat; echo over", streams="stdin stdout", tty=True)
    async with spdy(url, "stdin", "stdout", "resize") as (client, ids):
        await arrives(client, ids["stdout"], b"ready\r\n")
        await client.send(ids["stdin"], b"word\n")
        await arrives(client, ids["stdout"], b"word\r\nword\r\n")
        await client.send(ids["stdin"], b"\x03")
        assert exit_code(await client.status(ids["error"])) == 130
        assert await client.streams[ids["stdout"]].text() == "ready\r\nword\r\nword\r\n^C"


async def test_what_is_typed_before_the_command_runs_is_not_lost_nor_echoed_twice(container: Running) -> None:
    url = container.exec_url("cat", streams="stdin stdout", tty=True)
    async with spdy(url, "stdin", "stdout", "resize") as (client, ids):
        await client.send(ids["stdin"], b"early\n", fin=True)
        assert exit_code(await client.status(ids["error"])) == 0
        assert await client.streams[ids["stdout"]].text() == "early\r\nearly\r\n"


async def test_the_last_output_of_a_terminal_is_whole(container: Running) -> None:
    for _ in range(3):
        url = container.exec_url("seq", "1", "30000", streams="stdout", tty=True)
        async with spdy(url, "stdout", "resize") as (client, ids):
            assert exit_code(await client.status(ids["error"])) == 0
            text = await client.streams[ids["stdout"]].text()
            assert text.splitlines() == [str(number) for number in range(1, 30001)]


# ---- WebSocket


@pytest.mark.parametrize("protocol", ["v5.channel.k8s.io", "v4.channel.k8s.io", "v4.base64.channel.k8s.io"])
async def test_websocket_channels(container: Running, protocol: str) -> None:
    url = container.exec_url(*SHELL, "read line; echo got $line; echo oops >&2; exit 9", streams="stdin stdout stderr")
    client = await WebSocketClient.connect(url, protocol)
    assert client.subprotocol == protocol
    client.send(0, b"line\n")
    status = await client.status()
    assert exit_code(status) == 9
    assert (client.text(1), client.text(2)) == ("got line\n", "oops\n")
    await client.close()


async def test_websocket_v5_closes_input(container: Running) -> None:
    client = await WebSocketClient.connect(container.exec_url("cat", streams="stdin stdout"), "v5.channel.k8s.io")
    client.send(0, b"some")
    client.send(255, bytes([0]))
    assert exit_code(await client.status()) == 0
    assert client.text(1) == "some"
    await client.close()


async def test_websocket_terminal(container: Running) -> None:
    url = container.exec_url(*SHELL, "read x; stty size", streams="stdin stdout", tty=True)
    client = await WebSocketClient.connect(url, "v5.channel.k8s.io")
    client.send(4, b'{"Width":90,"Height":33}')
    client.send(0, b"\n")
    assert exit_code(await client.status()) == 0
    assert client.text(1).endswith("33 90\r\n")
    await client.close()


# ---- ends


@pytest.mark.parametrize("tty", [False, True])
async def test_a_client_that_goes_away_ends_the_whole_session(container: Running, tty: bool) -> None:
    script = "(sleep 997; :) & (trap '' HUP TERM; sleep 998; :) & echo ready; sleep 999"
    names = ("stdout", "resize") if tty else ("stdout", "stderr")
    url = container.exec_url(*SHELL, script, streams=" ".join(names), tty=tty)
    async with spdy(url, *names) as (client, ids):
        await arrives(client, ids["stdout"], b"ready")
        await until(lambda: len(container.processes()) >= 6)
        client.writer.transport.abort()
        await until(lambda: list(container.processes().values()) == ["sleep 1000"])


async def test_a_client_that_goes_away_at_any_instant_leaves_nothing(container: Running) -> None:
    for delay in (0.0, 0.002, 0.004, 0.006, 0.008, 0.012, 0.016, 0.02, 0.03):
        url = container.exec_url(*SHELL, "sleep 998 & sleep 999")
        async with spdy(url, "stdout", "stderr") as (client, _):
            await asyncio.sleep(delay)
            client.writer.transport.abort()
    folder = container.agent.run / "containers" / container.id
    await until(lambda: not list(folder.glob("exec-*")))
    await until(lambda: list(container.processes().values()) == ["sleep 1000"])


@pytest.mark.parametrize("tty", [False, True])
async def test_a_container_that_stops_ends_its_streams_with_a_status(container: Running, tty: bool) -> None:
    names = ("stdout", "resize") if tty else ("stdout", "stderr")
    url = container.exec_url(*SHELL, "echo ready; sleep 999", streams=" ".join(names), tty=tty)
    async with spdy(url, *names) as (client, ids):
        await arrives(client, ids["stdout"], b"ready")
        await asyncio.to_thread(container.agent.client.stop, container.id)
        assert exit_code(await client.status(ids["error"])) == 137
        await asyncio.wait_for(client.went_away.wait(), SOON)


async def test_a_stopping_agent_says_why_and_ends_the_command(own_agent: AgentProcess) -> None:
    container = run(own_agent)
    async with spdy(container.exec_url(*SHELL, "echo ready; sleep 999"), "stdout", "stderr") as (client, ids):
        await arrives(client, ids["stdout"], b"ready")
        await asyncio.to_thread(own_agent.stop)
        status = await client.status(ids["error"])
        assert "the node agent is stopping" in status["message"]
        await asyncio.wait_for(client.closed.wait(), SOON)
        assert list(container.processes().values()) == ["sleep 1000"]


async def test_streams_that_do_nothing_are_ended_as_configured(tmp_path: Path, busybox: Path) -> None:
    options = "[streaming]\nidle_seconds = 2.5\ncreation_seconds = 1.2"
    with running_agent(tmp_path, busybox, options=options) as agent:
        container = run(agent)
        async with spdy(container.exec_url("sleep", "999"), "stdout", "stderr") as (client, ids):
            assert "no data passed for 2.5 s" in (await client.status(ids["error"]))["message"]
        async with spdy(container.exec_url("sleep", "999"), "stdout") as (client, ids):
            assert "did not open the streams stderr in time" in (await client.status(ids["error"]))["message"]
        await until(lambda: list(container.processes().values()) == ["sleep 1000"])


# ---- requests


async def test_a_url_works_once_and_only_for_an_upgrade(crun: Running) -> None:
    url = crun.exec_url("true")
    plain = f"GET {url.partition('//')[2].partition('/')[1]}{url.split('/', 3)[3]} HTTP/1.1\r\nHost: x\r\n\r\n"
    _, writer, head = await request(url, plain.encode())
    writer.close()
    assert head.startswith("HTTP/1.1 400 ")
    async with spdy(url, "stdout", "stderr") as (client, ids):
        assert exit_code(await client.status(ids["error"])) == 0
    for used in (url, f"{url}x", f"{url.rpartition('/')[0]}/"):
        _, writer, head = await request(used, plain.replace(url.split("/", 3)[3], used.split("/", 3)[3]).encode())
        writer.close()
        assert head.startswith("HTTP/1.1 404 ")


async def test_a_url_of_a_container_that_has_gone_meanwhile(crun: Running) -> None:
    url = crun.exec_url("true")
    crun.agent.client.stop(crun.id)
    async with spdy(url, "stdout", "stderr") as (client, ids):
        status = await client.status(ids["error"])
        assert "not running" in status["message"]


async def test_a_hundred_commands_at_once(crun: Running) -> None:
    async def one(number: int) -> str:
        async with spdy(crun.exec_url("echo", str(number)), "stdout", "stderr") as (client, ids):
            assert exit_code(await client.status(ids["error"])) == 0
            return await client.streams[ids["stdout"]].text()

    assert await asyncio.gather(*map(one, range(100))) == [f"{number}\n" for number in range(100)]
