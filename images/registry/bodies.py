"""Reads bodies of HTTP responses, with limits of size and time, and decodes their Content-Encoding."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import aiohttp
import msgspec

from host import untrusted_json
from host.concurrency.threads import in_image_thread
from host.untrusted_json import JsonError

MAX_ERROR_BYTES = 64 << 10
MAX_TOKEN_BYTES = 1 << 20

ENCODINGS = ("gzip", "x-gzip", "deflate")  # RFC 9110, section 8.4.1
_WINDOW_BITS = 47  # gzip or zlib, according to their headers
_GZIP = b"\x1f\x8b"
_LARGE = 32 << 10
_SHOWN = 300


class _Error(msgspec.Struct):
    code: str | None = None
    message: str | None = None


class _Errors(msgspec.Struct):
    errors: list[_Error]


class BodyError(Exception):
    """The body is larger than allowed, or its encoding is unknown or broken."""


async def read_body(response: aiohttp.ClientResponse, limit: int, seconds: float) -> bytes:
    """The body as received. Closes the response. BodyError above ``limit`` bytes, TimeoutError after ``seconds``."""
    async with asyncio.timeout(seconds):
        return await collect(response, response.content.iter_any(), limit)


async def collect(
    response: aiohttp.ClientResponse, chunks: AsyncIterator[bytes], limit: int, content: bytearray | None = None
) -> bytes:
    """Join ``chunks`` of the response's body and close the response. BodyError above ``limit`` bytes.

    After an error, ``content`` has what was received before it.
    """
    try:
        if (response.content_length or 0) > limit:
            raise BodyError(f"larger than {limit} bytes")
        content = bytearray() if content is None else content
        async for chunk in chunks:
            content += chunk
            if len(content) > limit:
                raise BodyError(f"larger than {limit} bytes")
        return bytes(content)
    finally:
        response.close()


def encoding_of(response: aiohttp.ClientResponse) -> str:
    """The body's Content-Encoding; empty for none. The client requests no encoding, but some servers use one."""
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    return "" if encoding == "identity" else encoding


async def decoded(content: bytes, encoding: str, limit: int) -> bytes:
    """Decode ``content``. BodyError if ``encoding`` is unknown or broken, or if the result is above ``limit`` bytes."""
    if not encoding:
        return content
    if encoding not in ENCODINGS:
        raise BodyError(f"encoded as {encoding[:50]!r}, which was not asked for")
    if len(content) <= _LARGE and limit <= MAX_TOKEN_BYTES:
        return _decompress(content, limit)
    return await in_image_thread(_decompress, content, limit)


def _decompress(content: bytes, limit: int) -> bytes:
    for bits in (_WINDOW_BITS, -zlib.MAX_WBITS):  # some servers send deflate without zlib's header
        machine = zlib.decompressobj(bits)
        try:
            plain = machine.decompress(content, limit + 1)
        except zlib.error:
            continue
        if len(plain) > limit:
            raise BodyError(f"larger than {limit} bytes")
        if machine.eof:
            return plain
    raise BodyError("broken: it does not have its Content-Encoding")


async def decoded_blob(
    chunks: AsyncGenerator[bytes, None], encoding: str, media_type: str
) -> AsyncGenerator[bytes, None]:
    """The chunks of a blob of that type, decoded as they arrive.

    Chunks that are not encoded at all stay as they are: some hosts declare compressed files as encoded. Raises
    aiohttp.ClientPayloadError for a broken stream.
    """
    machine: zlib._Decompress | None = None
    begun = False
    async with aclosing(chunks):
        async for chunk in chunks:
            if not begun:
                begun, machine = True, _decompressor(chunk, encoding, media_type)
            if machine is None:
                yield chunk
                continue
            rest = chunk
            while rest and not machine.eof:
                try:
                    piece = machine.decompress(rest, _LARGE)
                except zlib.error as error:
                    raise aiohttp.ClientPayloadError(f"its Content-Encoding is broken: {error}") from error
                rest = machine.unconsumed_tail
                if piece:
                    yield piece
    if machine is not None and not machine.eof:
        raise aiohttp.ClientPayloadError("its Content-Encoding is cut off")


def _decompressor(start: bytes, encoding: str, media_type: str) -> zlib._Decompress | None:
    """The decompressor for a blob whose first bytes are ``start``; None if it is not encoded."""
    for bits in (_WINDOW_BITS, -zlib.MAX_WBITS) if encoding == "deflate" else (_WINDOW_BITS,):
        try:
            plain = zlib.decompressobj(bits).decompress(start, len(_GZIP))
        except zlib.error:
            continue
        if plain and "gzip" in media_type and not plain.startswith(_GZIP):
            return None  # decoded, it would not be of its type
        return zlib.decompressobj(bits)
    return None


async def error_text(response: aiohttp.ClientResponse, seconds: float) -> str:
    """A short text for a registry's error response (OCI distribution specification, "Error Codes")."""
    status = f"{response.status} {response.reason}"
    try:
        content = await read_body(response, MAX_ERROR_BYTES, seconds)
        content = await decoded(content, encoding_of(response), MAX_ERROR_BYTES)
        errors = untrusted_json.decode(content, _Errors).errors
    except (BodyError, JsonError, aiohttp.ClientError, TimeoutError, OSError):
        errors = []
    words = [" ".join(filter(None, (error.code, error.message))) for error in errors[:3]]
    return plain_text("; ".join(words)[:_SHOWN] or status)


def plain_text(text: str) -> str:
    """Replace characters of a registry's ``text`` that could control a terminal or could not be sent."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)
