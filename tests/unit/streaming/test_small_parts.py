"""Tokens, limits, statuses, requests and terminal sizes."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from cri.config.options import StreamingOptions
from cri.streaming.backend import TerminalSize
from cri.streaming.cleanup import left_fully
from cri.streaming.httpstream.http_upgrade import HttpError, HttpUpgrade
from cri.streaming.limits import StreamLimits
from cri.streaming.remote_command import SizeReader
from cri.streaming.server import StreamingServer
from cri.streaming.status import CommandStatus
from cri.streaming.tokens import ExecRequest, TokenTable
from host.errors import InvalidArgumentError, LimitError
from tests.integration.streaming.local_backend import LocalBackend

REQUEST = ExecRequest("c", ("true",), tty=False, stdin=False, stdout=True, stderr=False)


def test_tokens_work_once() -> None:
    table = TokenTable(60, 10)
    token = table.issue(REQUEST)
    assert re.fullmatch(r"[\w-]{22}", token), "128 bits in base64"
    assert table.peek(token) is REQUEST
    assert table.take(token) is REQUEST
    assert table.take(token) is None


def test_tokens_differ() -> None:
    table = TokenTable(60, 1000)
    assert len({table.issue(REQUEST) for _ in range(1000)}) == 1000


def test_tokens_are_good_for_their_lifetime() -> None:
    now = [0.0]
    table = TokenTable(60, 10, lambda: now[0])
    old = table.issue(REQUEST)
    now[0] = 59.9
    young = table.issue(REQUEST)
    assert table.peek(old) is REQUEST
    now[0] = 60.0
    assert table.take(old) is None
    assert table.take(young) is REQUEST


def test_tokens_are_bounded_and_expiry_makes_room() -> None:
    now = [0.0]
    table = TokenTable(60, 2, lambda: now[0])
    table.issue(REQUEST)
    table.issue(REQUEST)
    with pytest.raises(LimitError, match="2 streams wait"):
        table.issue(REQUEST)
    now[0] = 61.0
    assert table.take(table.issue(REQUEST)) is REQUEST


def test_times_that_are_promised() -> None:
    limits = StreamLimits()
    assert (limits.token_lifetime, limits.idle_timeout, limits.creation_timeout) == (60, 4 * 3600, 30)
    options = StreamingOptions()
    assert (options.idle_seconds, options.creation_seconds) == (4 * 3600, 30)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_tls(host: str) -> None:
    StreamLimits(host=host).check()


@pytest.mark.parametrize(
    "limits",
    [
        StreamLimits(host="0.0.0.0"),
        StreamLimits(host="::"),
        StreamLimits(host="node.example"),
        StreamLimits(host="10.0.0.1", tls_certificate="c", tls_key="k"),
        StreamLimits(tls_certificate="c"),
        StreamLimits(tls_client_ca="ca"),
    ],
)
def test_addresses_that_must_not_be_listened_on(limits: StreamLimits) -> None:
    with pytest.raises(InvalidArgumentError):
        limits.check()


def test_elsewhere_with_client_certificates() -> None:
    StreamLimits(host="10.0.0.1", tls_certificate="c", tls_key="k", tls_client_ca="ca").check()


async def test_urls_are_checked() -> None:
    server = StreamingServer(LocalBackend())
    await server.start()
    with pytest.raises(InvalidArgumentError, match="at least one"):
        server.exec_url("c", ["true"], tty=False, stdin=False, stdout=False, stderr=False)
    with pytest.raises(InvalidArgumentError, match="terminal"):
        server.exec_url("c", ["true"], tty=True, stdin=True, stdout=True, stderr=True)
    with pytest.raises(InvalidArgumentError, match="terminal"):
        server.attach_url("c", tty=True, stdin=True, stdout=True, stderr=True)
    with pytest.raises(InvalidArgumentError, match="no command"):
        server.exec_url("c", [], tty=False, stdin=False, stdout=True, stderr=False)
    for port in (0, -1, 65536):
        with pytest.raises(InvalidArgumentError, match="not a port"):
            server.port_forward_url("p", [port])
    url = server.port_forward_url("p", [80])
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/portforward/[\w-]{22}", url)
    await server.close()


def test_success_is_what_clients_compare_with() -> None:
    assert CommandStatus.of_exit(["true"], 0).as_json() == b'{"status":"Success"}'
    assert CommandStatus.of_exit(["true"], 0).as_text() == b""


def test_exit_codes_are_causes() -> None:
    status = json.loads(CommandStatus.of_exit(["sh", "-c", "exit 7"], 7).as_json())
    assert status["details"] == {"causes": [{"reason": "ExitCode", "message": "7"}]}
    assert status["message"].endswith("error executing command [sh -c exit 7], exit code 7")


def test_request_in_pieces_with_the_next_protocol_behind() -> None:
    data = b"POST /exec/t?x=1 HTTP/1.1\r\nHost: h\r\nConnection: keep-alive, Upgrade\r\nUpgrade: SPDY/3.1\r\n"
    data += b"X-Stream-Protocol-Version: a, b\r\nX-Stream-Protocol-Version: c\r\n\r\n"
    for cut in range(1, len(data)):
        upgrade = HttpUpgrade()
        assert upgrade.receive(data[:cut]) is None
        request = upgrade.receive(data[cut:] + b"\x80\x03")
        assert request is not None
        assert (request.method, request.path, request.protocol) == ("POST", "/exec/t", "spdy/3.1")
        assert request.query == {"x": ["1"]}
        assert request.listed("x-stream-protocol-version") == ["a", "b", "c"]
        assert upgrade.switch([("Upgrade", "SPDY/3.1")]).startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
        assert upgrade.trailing_data == b"\x80\x03"


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\nx" + bytes(70_000),
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc",
    ],
)
def test_bad_requests(data: bytes) -> None:
    upgrade = HttpUpgrade()
    with pytest.raises(HttpError) as refused:
        upgrade.receive(data)
    assert refused.value.status in (400, 431)
    assert upgrade.refuse(refused.value).startswith(b"HTTP/1.1 4")


@pytest.mark.parametrize(
    ("pieces", "size"),
    [
        ([b'{"Width":80,"Height":24}\n'], (80, 24)),
        ([b'{"Wid', b'th":80,"Height":24}'], (80, 24)),
        ([b'{"height":1,"width":2}{"Width":3,"Height":4}'], (3, 4)),
        ([b'junk{"Width":80,"Height":24}'], (80, 24)),
        ([b'{"Width":80,"Height":24}{"Width":"x"}'], (80, 24)),
        ([b'{"Width":80000,"Height":24}'], None),
        ([bytes(5000), b'{"Width":5,"Height":6}'], (5, 6)),
        ([b'{"Width":1e999,"Height":24}{"Width":5,"Height":6}'], (5, 6)),
        ([b"{}[]"], None),
        ([b'{"Width":' + b"[" * 60_000 + b"]" * 60_000 + b'}{"Width":5,"Height":6}'], (5, 6)),
        ([b'{"Width":null,"Height":24}{"Width":5.0,"Height":6,"Type":"resize"}'], (5, 6)),
    ],
)
def test_terminal_sizes(pieces: list[bytes], size: tuple[int, int] | None) -> None:
    reader = SizeReader(None)
    for piece in pieces:
        reader.feed(piece)
    assert reader.size == (None if size is None else TerminalSize(*size))
    assert len(reader.pending) <= 1024


@pytest.mark.parametrize("fails", [False, True])
async def test_a_context_is_left_to_its_end_though_cancelled(fails: bool) -> None:
    leaving, may_end, left = asyncio.Event(), asyncio.Event(), list[str]()

    @asynccontextmanager
    async def slow() -> AsyncIterator[str]:
        try:
            yield "value"
        finally:
            leaving.set()
            await may_end.wait()
            left.append("left")

    async def use() -> None:
        async with left_fully(slow()) as value:
            assert value == "value"
            if fails:
                raise ValueError

    task = asyncio.create_task(use())
    await leaving.wait()
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert left == ["left"]
