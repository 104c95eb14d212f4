"""Registries whose answers never end, in any part of an answer: each pull fails within the limits."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from host.errors import KubeletReasonError
from images.registry.credentials import Credentials
from tests.integration.images.conftest import Node
from tests.support.agent import SOON
from tests.support.image_builder import digest_of
from tests.support.scripted_registry import small_image

NewNode = Callable[..., Awaitable[Node]]

MANIFEST, KIND, (CONFIG, LAYER) = small_image()
SLOWNESS = 0.02  # seconds between two bytes or lines: much less than the allowed time without data
OPTIONS = {"connect_seconds": 0.5, "stall_seconds": 0.5, "attempts": 2, "slow_seconds": 0.5}
BODIES = {
    "/manifests/": MANIFEST,
    f"/blobs/{digest_of(CONFIG)}": CONFIG,
    f"/blobs/{digest_of(LAYER)}": LAYER,
    "/token": json.dumps({"token": "t"}).encode(),
}
OK = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\n" % KIND.encode()
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"

# The bytes that are sent first, and those that are then sent repeatedly. ``%b`` is the body as a chunk.
ENDLESS = {
    "one header": (OK + b"X-Long: ", b"x"),
    "headers": (OK, b"X-More: x\r\n"),
    "headers of an error": (b"HTTP/1.1 404 Not Found\r\n", b"X-More: x\r\n"),
    "body of an error": (b"HTTP/1.1 404 Not Found\r\nContent-Length: 60000\r\n\r\n", b"x"),
    "interim answers": (b"", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"),
    "silence": (b"", b""),
    "silence in the body": (OK + b"Content-Length: 60000\r\n\r\n", b""),
    "chunk extension": (CHUNKED + b"1;x=", b"x"),
    "trailers": (CHUNKED + b"%b", b"X-More: x\r\n"),
    "body": (OK + b"Content-Length: 60000\r\n\r\n", b"x"),
    "body without a length": (OK + b"\r\n", b" "),
}


class Stalling:
    """A registry that answers ``part`` of its paths endlessly, and requires a token if ``part`` is the token server."""

    def __init__(self, part: str, endless: tuple[bytes, bytes]) -> None:
        self.part = part
        self.first, self.again = endless
        self.host = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError), contextlib.closing(writer):
            while request := (await reader.readline()).split():
                headers = b""
                while (line := await reader.readline()) not in (b"\r\n", b""):
                    headers += line.lower()
                await self._answer(writer, request[1].decode(), b"authorization" in headers)

    async def _answer(self, writer: asyncio.StreamWriter, path: str, authorized: bool) -> None:
        content = next(content for part, content in BODIES.items() if part in path)
        if self.part == "/token" and self.part not in path and not authorized:
            realm = f'Bearer realm="http://{self.host}/token"'
            writer.write(f"HTTP/1.1 401 No\r\nContent-Length: 0\r\nWWW-Authenticate: {realm}\r\n\r\n".encode())
        elif self.part in path:
            writer.write(self.first.replace(b"%b", b"%x\r\n%b\r\n0\r\n" % (len(content), content)))
            while True:
                writer.write(self.again)
                await writer.drain()
                await asyncio.sleep(SLOWNESS)
        else:
            writer.write(OK + b"Content-Length: %d\r\n\r\n%b" % (len(content), content))
        await writer.drain()


@contextlib.asynccontextmanager
async def stalling(part: str, endless: tuple[bytes, bytes]) -> AsyncIterator[str]:
    registry = Stalling(part, endless)
    server = await asyncio.start_server(registry.serve, "127.0.0.1", 0)
    try:
        registry.host = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield registry.host
    finally:
        server.close()  # Python 3.13 would also wait for connections whose answers never end


@pytest.mark.parametrize("part", BODIES, ids=["manifest", "config", "layer", "token"])
async def test_an_endless_answer_fails_its_pull(new_node: NewNode, part: str) -> None:
    node = await new_node(**OPTIONS)

    async def pull(kind: str) -> str:
        async with stalling(part, ENDLESS[kind]) as host:
            try:
                await node.puller.pull(f"{host}/{kind.replace(' ', '-')}", Credentials(username="u", password="p"))
            except Exception as error:
                return type(error).__name__
        return "pulled"

    pulls = {kind: asyncio.create_task(pull(kind)) for kind in ENDLESS}
    done, late = await asyncio.wait(pulls.values(), timeout=SOON)
    for task in late:
        task.cancel()
    assert not late, [kind for kind, task in pulls.items() if task in late]
    refusals = {"PermissionDeniedError", "NotFoundError"}  # according to the status
    for kind, task in pulls.items():
        if kind == "trailers" and "/blobs/" in part:  # all bytes have arrived before what never ends
            assert task.result() == "pulled"
            continue
        expected = refusals if "error" in kind else {KubeletReasonError.__name__}
        assert task.result() in expected | {KubeletReasonError.__name__}, kind
    assert len(done) == len(ENDLESS)
    for image in node.store.images():
        await node.store.remove(image.id)
    await node.forget_partials()
    assert await node.leftovers() == {}
