"""A SPDY session on a link: its streams as channels."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from cri.streaming.httpstream import spdy_frames as frames
from cri.streaming.httpstream.channel import Channel, ChannelResetError
from cri.streaming.httpstream.connection import Link
from cri.streaming.httpstream.spdy_events import (
    DataReceived,
    Event,
    SessionFailed,
    StreamOpened,
    StreamReset,
    WentAway,
    WindowGrown,
)
from cri.streaming.httpstream.spdy_session import SpdyLimits, SpdySession
from cri.streaming.httpstream.turns import Turns

_SEND_CHUNK = 256 * 1024
# Frames that are handled before the clock is looked at.
_FRAMES_AT_ONCE = 32
# Seconds to wait for the first WINDOW_UPDATE of a peer that answers no PING.
_WINDOW_PATIENCE = 1.0


class SpdyChannel(Channel):
    """A stream of a SPDY session."""

    def __init__(self, link: SpdyLink, stream_id: int, headers: Mapping[str, str]) -> None:
        super().__init__()
        self._link = link
        self.stream_id = stream_id
        self.headers = headers
        self.window_grown = asyncio.Event()

    async def send(self, data: bytes | memoryview) -> None:
        """Send bytes as windows and the connection allow."""
        await self._link.send(self, memoryview(data))

    def send_last(self, data: bytes) -> None:
        """Send a short text and FIN."""
        self._link.send_last(self.stream_id, data)

    def reset(self) -> None:
        """RST_STREAM with CANCEL."""
        self._link.reset(self.stream_id)

    def fail(self) -> None:
        """The stream was reset: senders wake up too."""
        super().fail()
        self.window_grown.set()

    def _on_consumed(self, count: int) -> None:
        self._link.consumed(self, count)

    def _hold(self) -> None:
        self._link.hold(self)


class SpdyLink:
    """One end of a SPDY session; ``on_stream`` says for each new stream of the peer whether it is accepted."""

    def __init__(
        self,
        link: Link,
        on_stream: Callable[[SpdyChannel], bool],
        on_failed: Callable[[str], None],
        max_streams: int,
        *,
        client: bool = False,
    ) -> None:
        self._link = link
        self._later = Turns(link)
        self._on_stream = on_stream
        self._on_failed = on_failed
        self._session = SpdySession(client=client, limits=SpdyLimits(streams=max_streams))
        self._channels: dict[int, SpdyChannel] = {}
        self._turn = asyncio.Lock()
        self._went_away = False
        self.over = asyncio.Event()
        """Set once the peer said goodbye and the last stream is closed."""

    def open(self, headers: Mapping[str, str]) -> SpdyChannel:
        """Open a stream of ours."""
        stream_id = self._session.open_stream(headers)
        self._channels[stream_id] = SpdyChannel(self, stream_id, headers)
        self._flush()
        return self._channels[stream_id]

    def grant(self, of_stream: int, of_all: int) -> None:
        """Allow the peer to send that many bytes ahead: on each stream opened later, and on all together."""
        self._session.send_settings({frames.SETTINGS_INITIAL_WINDOW_SIZE: of_stream})
        self._flush()
        self._link.write(frames.window_update(0, of_all))

    def lose(self) -> None:
        """The peer left: no caller waits for it any longer."""
        for channel in self._channels.values():
            channel.fail()
        self.over.set()

    def receive(self, data: bytes) -> None:
        """Bytes of the peer. Work that exceeds the time of a turn continues in a later one (``turns.py``)."""
        if self._later.waits:
            self._session.receive(data, 0)
            return
        end = self._later.end_of_turn()
        for event in self._session.receive(data, _FRAMES_AT_ONCE):
            self._handle(event)
        while self._session.has_more:
            if self._later.put_off(end, lambda: self.receive(b"")):
                break
            for event in self._session.receive(b"", _FRAMES_AT_ONCE):
                self._handle(event)
        self._flush()
        self._notice_end()

    def _handle(self, event: Event) -> None:
        if isinstance(event, DataReceived):
            channel = self._channels.get(event.stream_id)
            if channel is None:
                self._session.consumed(event.stream_id, len(event.data))
                return
            self._link.touch()
            channel.feed(event.data, fin=event.fin)
        elif isinstance(event, StreamOpened):
            self._open(event)
        elif isinstance(event, StreamReset):
            channel = self._channels.pop(event.stream_id, None)
            if channel is not None:
                self._link.release(channel)
                channel.fail()
        elif isinstance(event, WindowGrown):
            self._wake_senders(event.stream_id)
        elif isinstance(event, WentAway):
            self._went_away = True
        elif isinstance(event, SessionFailed):
            self._on_failed(event.message)

    def _open(self, event: StreamOpened) -> None:
        channel = SpdyChannel(self, event.stream_id, event.headers)
        self._channels[event.stream_id] = channel
        if not self._session.is_open(event.stream_id) or not self._on_stream(channel):
            del self._channels[event.stream_id]
            self._session.reset(event.stream_id, frames.REFUSED_STREAM)
            return
        self._session.reply(event.stream_id)
        if event.fin:
            channel.feed(b"", fin=True)

    def _wake_senders(self, stream_id: int) -> None:
        if stream_id:
            if stream_id in self._channels:
                self._channels[stream_id].window_grown.set()
        else:
            for channel in self._channels.values():
                channel.window_grown.set()

    async def send(self, channel: SpdyChannel, view: memoryview) -> None:
        """Send ``view`` on the channel's stream. One sender at a time writes, which limits the bytes that wait."""
        position = 0
        while position < len(view):
            async with self._turn:
                await self._link.drain()
                channel.window_grown.clear()
                wanted = min(len(view) - position, _SEND_CHUNK)
                allowed = self._session.reserve(channel.stream_id, wanted)
                if allowed:
                    buffers = self._session.data(channel.stream_id, view[position : position + allowed])
                    self._link.write(b"".join(buffers))
                    self._link.touch()
                    position += allowed
                    continue
            if not self._session.is_open(channel.stream_id):
                raise ChannelResetError(f"stream {channel.stream_id} is closed")
            self._flush()
            await self._window(channel)

    async def _window(self, channel: SpdyChannel) -> None:
        try:
            async with asyncio.timeout(_WINDOW_PATIENCE):
                await channel.window_grown.wait()
        except TimeoutError:
            self._session.stop_waiting_for_windows()

    def send_last(self, stream_id: int, data: bytes) -> None:
        """Send a short text past the windows, and FIN; nothing if that has been done."""
        self._flush()
        if last := self._session.data(stream_id, data, fin=True):
            self._link.write(b"".join(last))
        self._notice_end()

    def reset(self, stream_id: int) -> None:
        """Reset a stream."""
        self._session.reset(stream_id)
        channel = self._channels.pop(stream_id, None)
        if channel is not None:
            self._link.release(channel)
        self._flush()
        self._notice_end()

    def consumed(self, channel: SpdyChannel, count: int) -> None:
        """The channel's user took bytes."""
        self._link.release(channel)
        self._session.consumed(channel.stream_id, count)
        self._flush()

    def hold(self, channel: SpdyChannel) -> None:
        """Hold the connection: the channel's user reads more slowly than a client without windows sends."""
        self._link.hold(channel)

    def forget(self, channel: SpdyChannel) -> None:
        """Forget the channel; bytes that still arrive for it are dropped."""
        self._link.release(channel)
        self._channels.pop(channel.stream_id, None)

    def go_away(self) -> None:
        """Reset open streams and send GOAWAY. Bytes of the peer are ignored from now on."""
        self._later.close()
        self._session.go_away()
        self._flush()

    def _notice_end(self) -> None:
        if self._session.has_more:
            return
        if self._went_away and not self._session.open_streams:
            self.over.set()

    def _flush(self) -> None:
        output = self._session.take_output()
        if output:
            self._link.write(output)
