"""A proxy before a registry that requires tokens, or breaks, stalls, redirects, limits or fails requests."""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web

TOKEN = "a-token-of-the-test"
_LARGE = 50_000


@dataclass
class Front:
    """``host`` is its address. The fields below set how it misbehaves. ``seen`` are the requests."""

    upstream: str
    host: str = ""
    scheme: str = "http"
    token_user: str = ""  # user:password that gets a token; "" requires no token, "*" gives a token to any client
    cut_after: int = 0  # bytes of each blob answer before the connection breaks
    cuts: int = 1 << 30  # the number of answers that break
    failures: dict[str, list[int]] = field(default_factory=dict)  # statuses to answer first, by part of the path
    retry_after: str = ""
    stall: bool = False
    redirect_blobs_to: str = ""
    refuse_ranges: bool = False
    trickle: int = 0  # bytes of each blob answer sent at a time, a hundredth of a second apart
    drip: dict[str, int] = field(default_factory=dict)  # bytes sent a tenth of a second apart, by part of the path
    hold: dict[str, asyncio.Event] = field(default_factory=dict)  # events to wait for before an answer, by path part
    range_answer: Callable[[int, bytes], web.Response] | None = None  # the answer to a range from that byte of a blob
    head_status: int = 0  # the status of answers to HEAD of a manifest
    cut_manifests: int = 0  # the number of answers with a manifest that break in the middle
    stalled: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)  # set when a client of a held answer left
    seen: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    _gate: asyncio.Event | None = None
    _whole: int = 0

    def hold_after(self, whole: int) -> asyncio.Event:
        """Send ``whole`` large blobs completely. Of the others, send only a part until the event is set."""
        self._whole, self._gate = whole, asyncio.Event()
        return self._gate

    def count(self) -> Counter[str]:
        """The number of requests for each path."""
        return Counter(path for _, path, _ in self.seen)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer one request."""
        self.seen.append((request.method, request.path_qs, dict(request.headers)))
        for part, event in self.hold.items():
            if part in request.path:
                await event.wait()
        for part, statuses in self.failures.items():
            if part in request.path and statuses:
                headers = {"Retry-After": self.retry_after} if self.retry_after else {}
                return web.Response(status=statuses.pop(0), headers=headers)
        if request.path == "/token":
            return self._token(request)
        if self.token_user and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            realm = f'Bearer realm="{self.scheme}://{self.host}/token",service="test"'
            return web.Response(status=401, headers={"WWW-Authenticate": realm})
        if self.redirect_blobs_to and "/blobs/" in request.path:
            raise web.HTTPTemporaryRedirect(f"{self.redirect_blobs_to}{request.path}")
        return await self._pass_on(request)

    def _token(self, request: web.Request) -> web.Response:
        expected = "Basic " + base64.b64encode(self.token_user.encode()).decode()
        if self.token_user != "*" and request.headers.get("Authorization") != expected:
            return web.Response(status=401)
        return web.json_response({"token": TOKEN})

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        if request.method == "HEAD" and self.head_status and "/manifests/" in request.path:
            return web.Response(status=self.head_status)
        passed = ("Accept", "Range", "Content-Type")
        headers = {name: value for name, value in request.headers.items() if name in passed}
        asked = headers.get("Range", "")
        if self.refuse_ranges or self.range_answer:
            headers.pop("Range", None)
        async with aiohttp.ClientSession(auto_decompress=False) as session:
            url = f"http://{self.upstream}{request.path_qs}"
            async with session.request(request.method, url, headers=headers, data=await request.read()) as upstream:
                wanted = ("Location", "Content-Type", "Content-Length", "Docker-Content-Digest", "Content-Range")
                kept = {name: value for name, value in upstream.headers.items() if name in wanted}
                if self.range_answer and asked and "/blobs/" in request.path:
                    return self.range_answer(int(asked.removeprefix("bytes=").partition("-")[0]), await upstream.read())
                response = web.StreamResponse(status=upstream.status, headers=kept)
                await response.prepare(request)
                if request.method == "HEAD":
                    return response
                await self._send(request, response, await upstream.read())
                return response

    async def _send(self, request: web.Request, response: web.StreamResponse, content: bytes) -> None:
        assert request.transport is not None
        slow = next((size for part, size in self.drip.items() if part in request.path), 0)
        if slow:
            for begin in range(0, len(content), slow):
                await response.write(content[begin : begin + slow])
                await asyncio.sleep(0.1)
        elif "/manifests/" in request.path and self.cut_manifests:
            self.cut_manifests -= 1
            await response.write(content[:20])
            request.transport.close()
        elif "/blobs/" in request.path and (self.stall or 0 < self.cut_after < len(content)) and self.cuts:
            self.cuts -= 1
            await response.write(content[: self.cut_after or 10])
            if self.stall:
                self.stalled.set()
                await asyncio.Event().wait()
            request.transport.close()
        elif "/blobs/" in request.path and len(content) > _LARGE:
            await self._slowly(response, content)
        else:
            await response.write(content)

    async def _slowly(self, response: web.StreamResponse, content: bytes) -> None:
        self._whole -= 1
        if self._gate is not None and self._whole < 0:
            await response.write(content[:_LARGE])
            content = content[_LARGE:]
            try:
                await self._gate.wait()
            except asyncio.CancelledError:
                self.left.set()
                raise
        step = self.trickle or len(content)
        for begin in range(0, len(content), step):
            await response.write(content[begin : begin + step])
            if self.trickle:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def run_front(upstream: str, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[Front]:
    """Run a proxy before the registry at ``upstream`` on a free loopback port."""
    front = Front(upstream, scheme="https" if tls else "http")
    server = web.Server(front.answer, handler_cancellation=True)  # type: ignore[arg-type]  # any response
    runner = web.ServerRunner(server, shutdown_timeout=0.05)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
    await site.start()
    front.host = f"127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield front
    finally:
        await runner.cleanup()
