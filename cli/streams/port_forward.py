"""``podkeel port-forward``."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import itertools
import socket
from collections.abc import Iterator
from typing import NamedTuple

from cli.connect import connect
from cli.lookup import find_pod
from cli.streams.client import PORT_FORWARD_PROTOCOLS, StreamClient, run
from cli.streams.tls import TlsFiles
from cli.text import note
from cri.streaming.httpstream.channel import Channel, ChannelResetError
from host.errors import InvalidArgumentError, PodkeelError
from proto.runtime.v1 import cri_pb2

_READ_SIZE = 256 * 1024


class Forward(NamedTuple):
    """A local port (0: a free one), and the port of the pod that it forwards to."""

    local: int
    remote: int


def port_forward(options: argparse.Namespace) -> None:
    """Listen on local ports and forward their connections into a pod, until Ctrl-C."""
    forwards = [parse_forward(text) for text in options.ports]
    with connect(options) as client:
        pod = find_pod(client, options.pod)
        request = cri_pb2.PortForwardRequest(
            pod_sandbox_id=pod.id, port=sorted({forward.remote for forward in forwards})
        )
        url = client.call(request, cri_pb2.PortForwardResponse, "forward ports").url
    run(lambda: _forward(url, forwards, options.address, TlsFiles.of(options)))


def parse_forward(text: str) -> Forward:
    """``LOCAL:REMOTE``, ``:REMOTE`` for any local port, or ``PORT`` for both. Raises InvalidArgumentError."""
    first, colon, second = text.partition(":")
    local, remote = (first or "0", second) if colon else (text, text)
    if not all(number.isascii() and number.isdigit() and int(number) < 65536 for number in (local, remote)):
        raise InvalidArgumentError(f"{text!r} does not name ports: give [LOCAL:]REMOTE, as in 8080:80")
    if int(remote) == 0:
        raise InvalidArgumentError(f"{text!r}: 0 is not a port of the pod")
    return Forward(int(local), int(remote))


async def _forward(url: str, forwards: list[Forward], address: str, tls: TlsFiles) -> None:
    client = await StreamClient.connect(url, PORT_FORWARD_PROTOCOLS, tls)
    numbers = itertools.count()
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(client.close)
        for forward in forwards:
            for listener in _listeners(address, forward.local):
                serve = functools.partial(_carry, client, numbers, forward.remote)
                server = await asyncio.start_server(serve, sock=listener, limit=_READ_SIZE)
                stack.callback(server.close)
                host, port = listener.getsockname()[:2]
                shown = f"[{host}]" if ":" in host else host
                print(f"Forwarding from {shown}:{port} -> {forward.remote}", flush=True)
        await client.link.over.wait()
    raise PodkeelError("the connection to the agent was lost")


def _listeners(address: str, port: int) -> list[socket.socket]:
    """Listening sockets; for localhost one for each of its addresses, with the same port."""
    if address != "localhost":
        return [_listener(address, port)]
    first = _listener("127.0.0.1", port)
    with contextlib.suppress(InvalidArgumentError):
        return [first, _listener("::1", first.getsockname()[1])]
    return [first]


def _listener(address: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((address, port), family=family, backlog=128)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidArgumentError(f"cannot listen on {address} port {port}: {reason}; choose another one") from error


async def _carry(
    client: StreamClient,
    numbers: Iterator[int],
    port: int,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    """Copy both directions of one connection until each has ended."""
    headers = {"port": str(port), "requestid": str(next(numbers))}
    error = client.open({"streamtype": "error", **headers})
    error.finish()
    data = client.open({"streamtype": "data", **headers})
    inward = asyncio.ensure_future(_carry_inward(reader, data))
    try:
        with contextlib.suppress(ConnectionError):
            while chunk := await data.receive():
                writer.write(chunk)
                await writer.drain()
            if not data.was_reset:
                writer.write_eof()
        if message := await error.receive():
            note(message.decode(errors="replace"))
        if not data.was_reset:
            await inward
    finally:
        inward.cancel()
        data.reset()
        if data.was_reset:
            writer.transport.abort()
        writer.close()


async def _carry_inward(reader: asyncio.StreamReader, data: Channel) -> None:
    try:
        while chunk := await reader.read(_READ_SIZE):
            await data.send(chunk)
        data.finish()
    except ChannelResetError:
        return  # the other direction reports it too
    except ConnectionError:
        data.reset()
