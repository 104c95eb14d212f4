"""Port forwarding: each pair of channels becomes one TCP connection inside of a pod."""

from __future__ import annotations

import asyncio
import contextlib
import socket

from cri.streaming.backend import StreamBackend
from cri.streaming.httpstream.channel import Channel, ChannelResetError
from cri.streaming.httpstream.descriptors import OutputReader, write_all
from host.errors import PodkeelError


async def forward_port(backend: StreamBackend, sandbox_id: str, port: int, data: Channel, error: Channel) -> None:
    """Connect and move bytes until both directions are closed; a failure is sent on ``error`` and ends only this pair.

    ``error`` ends as soon as the pod has sent everything: clients wait for that before they close their side. Raises
    ConnectionResetError when the client is gone.
    """
    try:
        await _forward(backend, sandbox_id, port, data, error)
    except asyncio.CancelledError:
        error.send_last(f"the connection to port {port} of pod {sandbox_id} was ended by the node agent".encode())
        data.reset()
        raise


async def _forward(backend: StreamBackend, sandbox_id: str, port: int, data: Channel, error: Channel) -> None:
    try:
        connection = await backend.connect(sandbox_id, port)
    except PodkeelError as failure:
        data.finish()
        error.send_last(f"error forwarding port {port} to pod {sandbox_id}: {failure.message}".encode())
        data.reset()
        return
    try:
        with connection:
            await _relay(connection, data, error)
    except ConnectionResetError:
        raise
    except OSError as failure:  # such as ETIMEDOUT, for a program that was frozen
        reason = failure.strerror or failure
        error.send_last(f"the connection to port {port} of pod {sandbox_id} was lost: {reason}".encode())
        data.reset()
    error.finish()


async def _relay(connection: socket.socket, data: Channel, error: Channel) -> None:
    inward = asyncio.create_task(_relay_inward(data, connection))
    try:
        await _relay_outward(connection, data)
        error.finish()
        await inward
    except ChannelResetError:
        data.reset()
    finally:
        inward.cancel()
        with contextlib.suppress(asyncio.CancelledError, ChannelResetError):
            await inward


async def _relay_outward(connection: socket.socket, data: Channel) -> None:
    reader = OutputReader(connection.fileno())
    while chunk := await reader.read():
        await data.send(chunk)
    data.finish()


async def _relay_inward(data: Channel, connection: socket.socket) -> None:
    try:
        while chunk := await data.receive():
            await write_all(connection.fileno(), chunk)
        if not data.was_reset:
            connection.shutdown(socket.SHUT_WR)
    except OSError:
        # The pod's side accepts no more. What the client still sends is dropped, what the pod sent is still forwarded.
        while await data.receive():
            pass
    if data.was_reset:
        # The client does not read the pod's answer either.
        with contextlib.suppress(OSError):  # the pod's side has left as well
            connection.shutdown(socket.SHUT_RDWR)
        raise ChannelResetError("the client reset the connection")
