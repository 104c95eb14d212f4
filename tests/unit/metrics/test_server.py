"""The HTTP server for scrapers and probes, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from metrics.agent import AgentMetrics
from metrics.catalog import CATALOG
from metrics.exposition.prometheus import Page
from metrics.exposition.routes import Entries, standard_routes
from metrics.exposition.server import CLOSING_LIMIT, CONNECTION_LIMIT, HEADER_LIMIT, SLOW_LIMIT, MetricsServer, Route
from tests.integration.streaming.test_server import make_certificates, resident
from tests.support.waiting import until
from tests.unit.metrics.test_catalog import FULL, LABELS

CLOSE = "Connection: close\r\n"


@asynccontextmanager
async def serving(routes: dict[str, Route], tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    server = MetricsServer(routes, tls)
    try:
        yield await server.start("127.0.0.1", 0)
    finally:
        await server.close()


async def exchange(port: int, request: str) -> tuple[str, dict[str, str], bytes]:
    """Send one request, read until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request.encode())
    async with asyncio.timeout(60):
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    status, *lines = head.decode().split("\r\n")
    return status, {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}, body


def get(path: str, headers: str = CLOSE) -> str:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n"


async def test_standard_routes() -> None:
    problems: list[str] = []

    async def snapshots() -> Entries:
        return [(LABELS, FULL)]

    routes = standard_routes(AgentMetrics(), CATALOG, snapshots, lambda: problems)
    async with serving(routes) as port:
        status, headers, body = await exchange(port, get("/metrics"))
        assert status == "HTTP/1.1 200 OK"
        assert headers["content-type"].startswith("text/plain; version=0.0.4")
        assert b"process_open_fds" in body
        status, _, body = await exchange(port, get("/metrics/cadvisor?x=1"))
        assert b'container_memory_rss{container="c",' in body
        accept = f"Accept: application/openmetrics-text;version=1.0.0\r\n{CLOSE}"
        status, headers, body = await exchange(port, get("/metrics/cadvisor", accept))
        assert headers["content-type"].startswith("application/openmetrics-text")
        assert body.endswith(b"# EOF\n")
        assert (await exchange(port, get("/healthz")))[0] == "HTTP/1.1 200 OK"
        assert (await exchange(port, get("/readyz")))[0] == "HTTP/1.1 200 OK"
        problems.append("no CNI configuration in /etc/cni/net.d")
        status, _, body = await exchange(port, get("/readyz"))
        assert status == "HTTP/1.1 503 Service Unavailable"
        assert body == b"no CNI configuration in /etc/cni/net.d\n"
        assert (await exchange(port, get("/healthz")))[0] == "HTTP/1.1 200 OK"


async def echo(accept: str) -> Page:
    return Page("text/plain", f"accept={accept}".encode())


async def test_one_connection_serves_many_requests() -> None:
    async with serving({"/echo": echo}) as port:
        requests = get("/echo", "Accept: a\r\n") + get("/echo", "ACCEPT:b\r\n") + get("/echo")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(requests.encode())
        answer = await asyncio.wait_for(reader.read(), 60)
        writer.close()
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert b"accept=a" in answer
    assert b"accept=b" in answer
    assert answer.endswith(b"accept=")


async def test_head_has_no_body() -> None:
    async with serving({"/echo": echo}) as port:
        status, headers, body = await exchange(port, get("/echo").replace("GET", "HEAD"))
    assert (status, headers["content-length"], body) == ("HTTP/1.1 200 OK", "7", b"")


async def test_what_is_not_served() -> None:
    async def broken(accept: str) -> Page:
        raise RuntimeError("a secret")

    async with serving({"/broken": broken}) as port:
        assert (await exchange(port, get("/etc/passwd")))[0] == "HTTP/1.1 404 Not Found"
        status, _, body = await exchange(port, get("/broken"))
        assert status == "HTTP/1.1 500 Internal Server Error"
        assert b"secret" not in body
        post = f"POST /broken HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc{get('/broken')}"
        status, headers, _ = await exchange(port, post)  # closed, as the body is not read
        assert (status, headers["connection"]) == ("HTTP/1.1 405 Method Not Allowed", "close")
        assert (await exchange(port, f"GET /broken HTTP/1.1\r\n{CLOSE}\r\n"))[0] == "HTTP/1.1 400 Bad Request"
        assert (await exchange(port, "rubbish\r\n\r\n"))[0] == "HTTP/1.1 400 Bad Request"
        assert (await exchange(port, "GET /broken HTTP/1.0\r\n\r\n"))[1]["connection"] == "close"
        status, _, _ = await exchange(port, "x" * (HEADER_LIMIT * 2))
        assert status == "HTTP/1.1 431 Request Header Fields Too Large"


async def test_silent_clients_do_not_keep_others_out() -> None:
    async with serving({"/echo": echo}) as port:
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(CONNECTION_LIMIT)]
        assert (await exchange(port, get("/echo")))[0] == "HTTP/1.1 200 OK"
        assert await asyncio.wait_for(silent[0][0].read(), 60) == b""  # the one that was silent for longest
        reader, writer = silent[-1]
        writer.write(get("/echo").encode())
        assert (await asyncio.wait_for(reader.read(), 60)).startswith(b"HTTP/1.1 200 OK")
        for _, writer in silent:
            writer.close()


async def test_clients_that_do_not_read_block_no_others_and_use_no_memory() -> None:
    made = 0
    all_made = asyncio.Event()

    async def large(accept: str) -> Page:
        nonlocal made
        made += 1
        if made == CONNECTION_LIMIT:
            all_made.set()
        return Page("text/plain", bytes(8 << 20))

    async with serving({"/large": large, "/echo": echo}) as port:
        before = resident()
        slow = [await asyncio.open_connection("127.0.0.1", port, limit=1024) for _ in range(CONNECTION_LIMIT)]
        for _, writer in slow:
            writer.write(get("/large").encode())
        await asyncio.wait_for(all_made.wait(), 60)
        assert (await exchange(port, get("/echo")))[0] == "HTTP/1.1 200 OK"
        assert resident() - before < (SLOW_LIMIT + 8) * 2 * (8 << 20)
        for _, writer in slow:
            writer.transport.abort()


async def test_a_first_request_that_comes_in_drops_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metrics.exposition.server.REQUEST_SECONDS", 0.3)
    async with serving({"/echo": echo}) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        start = asyncio.get_running_loop().time()
        with contextlib.suppress(ConnectionError):
            while not reader.at_eof():
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.02)
        assert 0.2 < asyncio.get_running_loop().time() - start < 60
        writer.close()


async def test_one_page_of_a_kind_is_made_at_a_time() -> None:
    now = most = 0

    async def snapshots() -> Entries:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        return [(LABELS, FULL)]

    routes = standard_routes(AgentMetrics(), CATALOG, snapshots, list)
    pages = await asyncio.gather(*(routes["/metrics/cadvisor"]("") for _ in range(5)))
    assert most == 1
    assert len({page.body for page in pages}) == 1


async def test_closing_ends_open_connections() -> None:
    server = MetricsServer({"/echo": echo})
    port = await server.start("127.0.0.1", 0)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(get("/echo", "").encode())
    assert await reader.readuntil(b"accept=")
    await asyncio.wait_for(server.close(), 60)
    assert await asyncio.wait_for(reader.read(), 60) == b""
    writer.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - less to hold


def tls_of(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Those of a server and of a client."""
    make_certificates(folder)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server.pem", folder / "server.key")
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    return server, client


async def test_clients_that_do_not_end_tls_hold_few_descriptors(tmp_path: Path) -> None:
    server, client = tls_of(tmp_path)

    def ask_badly(port: int) -> socket.socket:
        connected = client.wrap_socket(socket.create_connection(("127.0.0.1", port)))
        connected.sendall(b"nonsense\r\n\r\n")
        assert connected.recv(100)
        return connected

    async with serving({"/echo": echo}, server) as port:
        before = descriptors()
        with contextlib.ExitStack() as stack:
            for _ in range(100):
                stack.enter_context(await asyncio.to_thread(ask_badly, port))
            assert descriptors() - before - 100 <= CLOSING_LIMIT + 4


async def test_clients_that_do_not_take_their_answers_are_gone_once_others_took_their_place() -> None:
    async def large(accept: str) -> Page:
        return Page("text/plain", bytes(8 << 20))

    async with serving({"/large": large}) as port:
        before = descriptors()
        slow = [await asyncio.open_connection("127.0.0.1", port, limit=1024) for _ in range(100)]
        try:
            for _, writer in slow:
                writer.write(get("/large").encode())
            await until(lambda: descriptors() - before - 100 <= SLOW_LIMIT + 4, "the end of most of them")
        finally:
            for _, writer in slow:
                writer.transport.abort()


@pytest.mark.parametrize(
    "sent", [b"", b"nonsense\r\n\r\n", b"GET /ec", get("/echo", "").encode(), get("/echo").encode()]
)
async def test_clients_over_tls_that_leave_in_any_way_are_no_errors(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, sent: bytes
) -> None:
    server, client = tls_of(tmp_path)

    def leave(port: int, way: int) -> None:
        connected = client.wrap_socket(socket.create_connection(("127.0.0.1", port)))
        connected.sendall(sent)
        if way == 0:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif way == 1:
            connected.shutdown(socket.SHUT_WR)
        connected.close()

    async with serving({"/echo": echo}, server) as port:
        before = descriptors()
        for turn in range(12):
            await asyncio.to_thread(leave, port, turn % 3)
        await until(lambda: descriptors() <= before, "the end of all connections")
    gc.collect()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
