"""Exec over SPDY against real processes."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from cri.streaming.server import StreamingServer
from tests.integration.streaming.conftest import Connect
from tests.integration.streaming.local_backend import LocalBackend
from tests.support.agent import SOON
from tests.support.waiting import until


def exec_url(server: StreamingServer, *command: str, streams: str = "stdout stderr", tty: bool = False) -> str:
    asked = streams.split()
    return server.exec_url(
        "c1", command, tty=tty, stdin="stdin" in asked, stdout="stdout" in asked, stderr="stderr" in asked
    )


async def test_output_and_success(server: StreamingServer, connect: Connect) -> None:
    client = await connect(exec_url(server, "sh", "-c", "echo hello; echo oops >&2"))
    assert "X-Stream-Protocol-Version: v4.channel.k8s.io\r\n" in client.head
    ids = await client.open_command("stdout", "stderr")
    assert await client.status(ids["error"]) == {"status": "Success"}
    assert await client.streams[ids["stdout"]].text() == "hello\n"
    assert await client.streams[ids["stderr"]].text() == "oops\n"
    await asyncio.wait_for(client.went_away.wait(), SOON)


async def test_half_closed_stdin_reaches_the_process(server: StreamingServer, connect: Connect) -> None:
    client = await connect(exec_url(server, "cat", streams="stdin stdout stderr"))
    ids = await client.open_command("stdin", "stdout", "stderr")
    await client.send(ids["stdin"], b"abc\n")
    await asyncio.wait_for(client.streams[ids["stdout"]].arrived.wait(), SOON)
    await client.send(ids["stdin"], b"def\n", fin=True)
    assert await client.streams[ids["stdout"]].text() == "abc\ndef\n"
    assert (await client.status(ids["error"]))["status"] == "Success"


@pytest.mark.parametrize(("script", "code"), [("exit 7", 7), ("kill -9 $$", 137), ("kill -TERM $$", 143)])
async def test_exit_codes_and_signals(server: StreamingServer, connect: Connect, script: str, code: int) -> None:
    client = await connect(exec_url(server, "sh", "-c", script))
    ids = await client.open_command("stdout", "stderr")
    assert await client.status(ids["error"]) == {
        "status": "Failure",
        "message": "command terminated with non-zero exit code: "
        f"error executing command [sh -c {script}], exit code {code}",
        "reason": "NonZeroExitCode",
        "details": {"causes": [{"reason": "ExitCode", "message": str(code)}]},
    }


async def test_missing_command_is_an_internal_error(server: StreamingServer, connect: Connect) -> None:
    client = await connect(exec_url(server, "/no/such/thing"))
    ids = await client.open_command("stdout", "stderr")
    status = await client.status(ids["error"])
    assert status["reason"] == "InternalError"
    assert status["code"] == 500
    assert status["message"].startswith("Internal error occurred: error executing command in container: ")
    assert "/no/such/thing" in status["message"]


@pytest.mark.parametrize(
    ("container", "words"), [("unstartable", "exec failed: permission denied"), ("stopped", "is not running")]
)
async def test_what_the_runtime_says_reaches_the_client(
    server: StreamingServer, connect: Connect, container: str, words: str
) -> None:
    client = await connect(server.exec_url(container, ["true"], tty=False, stdin=True, stdout=True, stderr=False))
    ids = await client.open_command("stdin", "stdout")
    status = await client.status(ids["error"])
    assert (status["status"], status["reason"]) == ("Failure", "InternalError")
    assert words in status["message"]
    assert await client.streams[ids["stdout"]].text() == ""


async def test_terminal_starts_with_the_clients_size(server: StreamingServer, connect: Connect) -> None:
    url = exec_url(server, "sh", "-c", "stty size; read x; stty size; exit 3", streams="stdin stdout", tty=True)
    client = await connect(url)
    ids = await client.open_command("stdin", "stdout")
    resize = client.session.open_stream({"streamtype": "resize"})
    client.streams[resize] = type(client.streams[ids["stdout"]])()
    client.flush()
    client.send_now(resize, b'{"Width":80,"Height":24}\n')
    stdout = client.streams[ids["stdout"]]
    await asyncio.wait_for(stdout.arrived.wait(), SOON)
    client.send_now(resize, b'{"Width":132,"Hei')
    client.send_now(resize, b'ght":50}\n')
    while b"24 80" not in stdout.data:
        stdout.arrived.clear()
        await asyncio.wait_for(stdout.arrived.wait(), SOON)
    await client.send(ids["stdin"], b"\n")
    assert (await client.status(ids["error"]))["details"]["causes"][0]["message"] == "3"
    assert await stdout.text() == "24 80\r\n\r\n50 132\r\n"


async def test_half_closed_stdin_ends_a_terminal_that_reads_lines(server: StreamingServer, connect: Connect) -> None:
    client = await connect(exec_url(server, "cat", streams="stdin stdout", tty=True))
    ids = await client.open_command("stdin", "stdout", "resize")
    await client.send(ids["stdin"], b"line\n", fin=True)
    assert (await client.status(ids["error"]))["status"] == "Success"


@pytest.mark.parametrize(
    ("protocols", "version"),
    [
        (("v3.channel.k8s.io", "v2.channel.k8s.io"), "v3.channel.k8s.io"),
        (("channel.k8s.io",), "channel.k8s.io"),
        ((), None),
    ],
)
async def test_older_protocols_end_with_plain_text(
    server: StreamingServer, connect: Connect, protocols: tuple[str, ...], version: str | None
) -> None:
    client = await connect(exec_url(server, "sh", "-c", "exit 2"), protocols)
    assert (f"X-Stream-Protocol-Version: {version}" in client.head) == (version is not None)
    ids = await client.open_command("stdout", "stderr")
    text = await client.streams[ids["error"]].text()
    assert text == "command terminated with non-zero exit code: error executing command [sh -c exit 2], exit code 2"


async def test_a_client_that_goes_away_ends_the_whole_group(
    server: StreamingServer, connect: Connect, backend: LocalBackend
) -> None:
    client = await connect(exec_url(server, "sh", "-c", "sleep 1000 & echo $!; wait"))
    ids = await client.open_command("stdout", "stderr")
    stdout = client.streams[ids["stdout"]]
    await asyncio.wait_for(stdout.arrived.wait(), SOON)
    child = int(stdout.data)
    client.writer.transport.abort()
    await until(lambda: not backend.running)
    await until(lambda: not is_alive(child))


async def test_a_child_left_behind_does_not_keep_the_streams(server: StreamingServer, connect: Connect) -> None:
    client = await connect(exec_url(server, "sh", "-c", "sleep 1000 & echo $!"))
    ids = await client.open_command("stdout", "stderr")
    assert (await client.status(ids["error"]))["status"] == "Success"
    assert (await client.streams[ids["stdout"]].text()).strip().isdigit()


async def test_a_reset_stdout_ends_a_process_that_keeps_writing(server: StreamingServer, connect: Connect) -> None:
    client = await connect(exec_url(server, "sh", "-c", "trap '' PIPE; yes; exit 9"))
    ids = await client.open_command("stdout", "stderr")
    await asyncio.wait_for(client.streams[ids["stdout"]].arrived.wait(), SOON)
    client.session.reset(ids["stdout"])
    client.flush()
    assert (await client.status(ids["error"]))["details"]["causes"][0]["message"] == "9"


async def test_input_that_the_process_does_not_read_is_dropped(server: StreamingServer, connect: Connect) -> None:
    client = await connect(exec_url(server, "sh", "-c", "exec <&-; sleep 0.3; echo done", streams="stdin stdout"))
    ids = await client.open_command("stdin", "stdout")
    await client.send(ids["stdin"], bytes(4 << 20), fin=True)
    assert await client.streams[ids["stdout"]].text() == "done\n"


async def test_a_stopping_server_says_why(server: StreamingServer, connect: Connect, backend: LocalBackend) -> None:
    client = await connect(exec_url(server, "sleep", "1000"))
    ids = await client.open_command("stdout", "stderr")
    await until(lambda: bool(backend.running))
    await server.close()
    status = await client.status(ids["error"])
    assert "stopping" in status["message"]
    await asyncio.wait_for(client.closed.wait(), SOON)
    assert not backend.running


async def test_unasked_and_repeated_streams_are_refused(server: StreamingServer, connect: Connect) -> None:
    client = await connect(exec_url(server, "true", streams="stdout"))
    for name in ("stdin", "nonsense"):
        stream_id = await client.open(streamtype=name)
        assert client.streams[stream_id].reset_status == 3
    ids = await client.open_command("stdout")
    assert (await client.status(ids["error"]))["status"] == "Success"


async def test_hundred_sessions_at_once(server: StreamingServer, connect: Connect) -> None:
    async def one(number: int) -> str:
        client = await connect(exec_url(server, "echo", str(number), streams="stdout"))
        ids = await client.open_command("stdout")
        assert (await client.status(ids["error"]))["status"] == "Success"
        return await client.streams[ids["stdout"]].text()

    assert await asyncio.gather(*map(one, range(100))) == [f"{number}\n" for number in range(100)]


def is_alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    return False
