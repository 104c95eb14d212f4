"""Copies between our standard streams and those of a process in a container."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cli.streams import terminal
from cli.streams.client import COMMAND_PROTOCOLS, StreamClient
from cli.streams.detach_keys import DetachKeys
from cli.streams.tls import TlsFiles
from cri.streaming.httpstream.channel import Channel, ChannelResetError
from cri.streaming.httpstream.descriptors import write_all
from host.errors import PodkeelError

_READ_SIZE = 64 * 1024


async def remote_command(url: str, tls: TlsFiles, *, stdin: bool, tty: bool, detach_keys: bytes = b"") -> int | None:
    """Copy until the process ends; returns its exit code, or 128 + n if signal n ended us.

    None if ``detach_keys`` were typed on our terminal. Raises PodkeelError when the command could not be run,
    or the connection was lost.
    """
    client = await StreamClient.connect(url, COMMAND_PROTOCOLS, tls)
    keys = DetachKeys(detach_keys if stdin and tty else b"")
    try:
        with terminal.endings_caught():
            return await _join(client, keys, stdin=stdin, tty=tty)
    except terminal.EndedBySignalError as error:
        return 128 + error.number
    finally:
        await client.close()


async def _join(client: StreamClient, keys: DetachKeys, *, stdin: bool, tty: bool) -> int | None:
    error = client.open({"streamtype": "error"})
    sink = client.open({"streamtype": "stdin"}) if stdin else None
    outputs = [(client.open({"streamtype": "stdout"}), 1)]
    if not tty:
        outputs.append((client.open({"streamtype": "stderr"}), 2))
    with contextlib.ExitStack() as stack:
        if tty:
            tell_size = _size_teller(client.open({"streamtype": "resize"}))
            tell_size()
            if sink is not None:
                stack.enter_context(terminal.raw(0, tell_size))
        showing = [asyncio.ensure_future(_show(channel, descriptor)) for channel, descriptor in outputs]
        sending = [asyncio.ensure_future(_send_input(sink, keys))] if sink is not None else []
        try:
            if await _until_shown(asyncio.gather(*showing), sending):
                return _exit_code(await _all_of(error))
            return None
        finally:
            for task in (*showing, *sending):
                task.cancel()


async def _until_shown(shown: asyncio.Future[list[None]], sending: Sequence[asyncio.Future[bool]]) -> bool:
    """Wait for the end of the process's output; False if we must end before."""
    waiting: set[asyncio.Future[Any]] = {shown, *sending}
    while not shown.done():
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if any(task.result() for task in done - {shown}):
            return False
    await shown
    return True


def _size_teller(channel: Channel) -> Callable[[], None]:
    tasks: set[asyncio.Task[None]] = set()

    def tell() -> None:
        size = terminal.size()
        if size is not None:
            task = asyncio.ensure_future(_send_size(channel, size))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    return tell


async def _send_size(channel: Channel, size: os.terminal_size) -> None:
    with contextlib.suppress(ChannelResetError, ConnectionResetError):
        await channel.send(json.dumps({"Width": size.columns, "Height": size.lines}).encode() + b"\n")


async def _send_input(channel: Channel, keys: DetachKeys) -> bool:
    """Send our standard input to its end; True once ``keys`` were typed.

    Input that the process does not take is not read.
    """
    with contextlib.suppress(ChannelResetError, ConnectionResetError, OSError):
        while data := await _read(0):
            passed_on, detach = keys.feed(data)
            if detach:
                return True
            await channel.send(passed_on)
        channel.finish()
    return False


async def _read(descriptor: int) -> bytes:
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()
    loop.add_reader(descriptor, lambda: None if readable.done() else readable.set_result(None))
    try:
        await readable
    finally:
        loop.remove_reader(descriptor)
    return os.read(descriptor, _READ_SIZE)


async def _show(channel: Channel, descriptor: int) -> None:
    with _output(descriptor) as output:
        while data := await channel.receive():
            await write_all(output, data)


@contextlib.contextmanager
def _output(descriptor: int) -> Iterator[int]:
    """Open the pipe or terminal of one of our descriptors again, for writing without blocking.

    The reader of our output may also be the writer of our input. It is opened again, since those whom
    we share the descriptor with do not expect it to be non-blocking. What cannot be opened so is used as it is.
    """
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
        yield descriptor
        return
    try:
        output = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        yield descriptor
        return
    try:
        yield output
    finally:
        os.close(output)


async def _all_of(channel: Channel) -> bytes:
    parts = []
    while data := await channel.receive():
        parts.append(data)
    return b"".join(parts)


def _exit_code(status: bytes) -> int:
    if not status:
        raise PodkeelError("the connection to the agent was lost before the command ended")
    answer = json.loads(status)
    if answer.get("status") == "Success":
        return 0
    if answer.get("reason") == "NonZeroExitCode":
        causes = answer.get("details", {}).get("causes", [])
        return next((int(cause["message"]) for cause in causes if cause.get("reason") == "ExitCode"), 1)
    raise PodkeelError(str(answer.get("message", "the agent does not say what failed")))
