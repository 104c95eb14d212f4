"""Exec and attach: moving bytes between a client's channels and a process, until it ends."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cri.streaming.attach_socket import INPUT_PACKET_SIZE, PACKET_SIZE, STDERR, STDOUT, AttachSocket
from cri.streaming.backend import ExecProcess, StreamBackend, TerminalSize
from cri.streaming.backlog import LIMIT, PATIENCE_SECONDS, Backlog
from cri.streaming.cleanup import left_fully
from cri.streaming.httpstream.channel import Channel, ChannelResetError
from cri.streaming.httpstream.descriptors import OutputReader, write_all
from cri.streaming.process_io import ProcessIO
from cri.streaming.status import CommandStatus
from cri.streaming.tokens import AttachRequest, ExecRequest
from host import untrusted_json
from host.errors import LimitError, PodkeelError

# Clients send the size after they open its channel. A program that draws at its start needs the size by then.
_FIRST_SIZE_SECONDS = 0.3
_SIZE_TEXT_LIMIT = 1024
_MAX_SIZE = 0xFFFF


@dataclass(slots=True)
class CommandChannels:
    """The client's channels; those that the request does not include are None."""

    error: Channel
    stdin: Channel | None = None
    stdout: Channel | None = None
    stderr: Channel | None = None
    resize: Channel | None = None


class RemoteCommand:
    """One exec or attach from its start to the status that the client gets."""

    def __init__(
        self,
        backend: StreamBackend,
        request: ExecRequest | AttachRequest,
        channels: CommandChannels,
        *,
        json_status: bool,
    ) -> None:
        self._backend = backend
        self._request = request
        self._channels = channels
        self._json_status = json_status
        self._sizes = SizeReader(channels.resize)
        self._ended = False

    async def run(self) -> None:
        """Run to the end; an error on the node's side becomes the status."""
        try:
            if isinstance(self._request, ExecRequest):
                status = await self._exec(self._request)
            else:
                status = await self._attach(self._request)
        except PodkeelError as error:
            status = CommandStatus.of_error(self._what_fails(), error.message)
        self._end(status)

    def abort(self, reason: str) -> None:
        """End the streams now, and send the client the reason; nothing if they have ended."""
        self._end(CommandStatus.of_error(self._what_fails(), reason))

    def _what_fails(self) -> str:
        return "error executing command in container" if isinstance(self._request, ExecRequest) else "error attaching"

    def _end(self, status: CommandStatus) -> None:
        if self._ended:
            return
        self._ended = True
        for channel in (self._channels.stdout, self._channels.stderr):
            if channel is not None:
                channel.finish()
        self._channels.error.send_last(status.as_json() if self._json_status else status.as_text())

    # ---- exec

    async def _exec(self, request: ExecRequest) -> CommandStatus:
        size = await self._sizes.first()
        async with left_fully(self._backend.exec(request, size)) as process:
            return CommandStatus.of_exit(request.command, await self._relay_process(process))

    async def _relay_process(self, process: ExecProcess) -> int:
        streams = process.io
        readers: list[OutputReader] = []
        async with asyncio.TaskGroup() as group:
            inputs = [group.create_task(self._sizes.apply(streams.resize))]
            if self._channels.stdin is not None and streams.stdin is not None:
                sink = streams.stdin
                inputs.append(group.create_task(_relay_input(self._channels.stdin, sink, streams.end_input)))
            for descriptor, channel in (
                (streams.stdout, self._channels.stdout),
                (streams.stderr, self._channels.stderr),
            ):
                if descriptor is not None and channel is not None:
                    readers.append(OutputReader(descriptor))
                    group.create_task(_relay_output(readers[-1], channel, streams, descriptor))
            outcome = await _outcome(process)
            for reader in readers:
                reader.process_ended()
            for task in inputs:
                task.cancel()
        if isinstance(outcome, PodkeelError):
            raise outcome
        return outcome

    # ---- attach

    async def _attach(self, request: AttachRequest) -> CommandStatus:
        async with left_fully(self._backend.attach(request)) as console:
            async with asyncio.TaskGroup() as group:
                backlog = Backlog()
                tasks = [
                    group.create_task(self._sizes.apply(console.resize)),
                    group.create_task(self._send_backlog(backlog)),
                ]
                if self._channels.stdin is not None:
                    sink = console.socket.fileno()
                    relay = _relay_input(self._channels.stdin, sink, console.end_input, step=INPUT_PACKET_SIZE)
                    tasks.append(group.create_task(relay))
                keeps_up = await _fill(backlog, console)
                if keeps_up:
                    await tasks[1]
                for task in tasks:
                    task.cancel()
        if not keeps_up:
            raise LimitError(
                f"the client did not read the container's output: {LIMIT >> 20} MiB waited for it for "
                f"{PATIENCE_SECONDS:g} s; the container continues: attach again, or read its log"
            )
        return CommandStatus()

    async def _send_backlog(self, backlog: Backlog) -> None:
        channels = {STDOUT: self._channels.stdout, STDERR: self._channels.stderr}
        while piece := await backlog.take():
            stream, data = piece
            channel = channels.get(stream)
            if channel is None:
                continue
            try:
                await channel.send(memoryview(data))
            except ChannelResetError:
                channels[stream] = None
            except ConnectionResetError:
                return  # the whole session is about to be cancelled


async def _fill(backlog: Backlog, console: AttachSocket) -> bool:
    """Read the console to its end; False if the client reads too slowly.

    conmon writes to each attached client and to the log in turn: a client that does not read would stop the container.
    """
    reader = OutputReader(console.socket.fileno(), PACKET_SIZE)
    while packet := await reader.read():
        backlog.add(packet[0], memoryview(packet)[1:])
        if not await backlog.room():
            return False
    backlog.end()
    return True


async def _relay_output(reader: OutputReader, channel: Channel, streams: ProcessIO, descriptor: int) -> None:
    try:
        while data := await reader.read():
            await channel.send(data)
        channel.finish()
    except ChannelResetError:
        streams.end_output(descriptor)
    except ConnectionResetError:
        return  # the whole session is about to be cancelled


async def _outcome(process: ExecProcess) -> int | PodkeelError:
    """The exit code, or the error why the command never ran: returned, so that remaining output is relayed first."""
    try:
        return await process.wait()
    except PodkeelError as error:
        return error


async def _relay_input(channel: Channel, descriptor: int, end_input: Callable[[], None], step: int = 1 << 30) -> None:
    try:
        while data := await channel.receive():
            await write_all(descriptor, data, step=step)
    except OSError:
        # The process reads no more input. Input of the client is dropped, so that its other streams continue.
        while await channel.receive():
            pass
    end_input()


class SizeReader:
    """Terminal sizes as JSON objects, received in pieces of any size."""

    def __init__(self, channel: Channel | None) -> None:
        self._channel = channel
        self.pending = b""
        self.size: TerminalSize | None = None

    async def first(self) -> TerminalSize | None:
        """The first size from the client, if it is sent at once."""
        if self._channel is None:
            return None
        try:
            async with asyncio.timeout(_FIRST_SIZE_SECONDS):
                while self.size is None and (data := await self._channel.receive()):
                    self.feed(data)
        except TimeoutError:
            return None
        return self.size

    async def apply(self, resize: Callable[[int, int], None]) -> None:
        """Resize now and whenever the client says so."""
        if self._channel is None:
            return
        while True:
            if self.size is not None:
                resize(*self.size)
            data = await self._channel.receive()
            if not data:
                return
            self.feed(data)

    def feed(self, data: bytes) -> None:
        """Bytes of the client; the last whole size in them counts."""
        self.pending += data
        end = 0
        for match in re.finditer(rb"\{[^{}]*\}", self.pending):
            end = match.end()
            self.size = _parse_size(match.group()) or self.size
        self.pending = self.pending[end:][-_SIZE_TEXT_LIMIT:]


def _parse_size(text: bytes) -> TerminalSize | None:
    try:
        given = untrusted_json.decode(text, dict[str, Any], max_bytes=_SIZE_TEXT_LIMIT)
        fields = {name.lower(): value for name, value in given.items()}
        width, height = int(fields["width"]), int(fields["height"])
    except (ValueError, KeyError, TypeError, OverflowError):  # OverflowError: a number is infinite
        return None
    return TerminalSize(width, height) if 0 <= width <= _MAX_SIZE and 0 <= height <= _MAX_SIZE else None
