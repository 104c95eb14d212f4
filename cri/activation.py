"""Socket activation (systemd.socket(5)): systemd listens for the agent, so that clients wait until it has started.

gRPC can only listen on sockets that it makes. While the agent serves, its own socket has the path, and systemd's socket
has another name beside it. The agent forwards clients that had connected to systemd's socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from pathlib import Path

from host.errors import WrongStateError

_MAX_RELAYED = 64  # clients forwarded at the same time; further ones wait
_PIECE = 1 << 16
_RETRY_SECONDS = 0.2  # pause after a failed accept, for example without free descriptors

_log = logging.getLogger("podkeel.server")


def is_served(path: Path) -> bool:
    """Whether a process listens on the unix socket ``path``."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except BlockingIOError:  # a process listens, but its queue of waiting clients is full
            return True
        except OSError:
            return False
    return True


class ActivatedSocket:
    """systemd's socket ``listening`` at ``path``. If ``listening`` is None, the methods do nothing."""

    def __init__(self, listening: socket.socket | None, path: Path) -> None:
        self._listening = listening
        self._path = path
        self._aside = path.with_name(f".{path.name}.systemd")
        self._made_way = False

    def make_way(self) -> None:
        """Free ``path`` for the agent's own socket.

        Removes a socket without a listener, which a killed agent left. Raises WrongStateError if another process serves
        it. Blocks for a moment.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.is_socket():
            if not is_served(self._path):
                self._path.unlink()
            elif self._listening is not None:
                self._path.rename(self._aside)
            else:
                raise WrongStateError(
                    f"socket {self._path} is served by another process: stop it, or use another socket"
                )
        self._made_way = True

    def put_back(self) -> None:
        """Rename systemd's socket to ``path`` again; without one, remove ``path``. Does nothing before ``make_way``."""
        if not self._made_way:
            return
        self._path.unlink(missing_ok=True)
        if self._listening is not None:
            with contextlib.suppress(FileNotFoundError):
                self._aside.rename(self._path)

    async def relay(self) -> None:
        """Forward clients of systemd's socket to the agent's own, for as long as this runs."""
        if self._listening is None:
            return
        loop = asyncio.get_running_loop()
        places = asyncio.Semaphore(_MAX_RELAYED)
        async with asyncio.TaskGroup() as relays:
            while True:
                await places.acquire()
                try:
                    client, _ = await loop.sock_accept(self._listening)
                except OSError as error:
                    places.release()
                    _log.warning("socket %s: cannot accept a client of systemd's socket: %s", self._path, error)
                    await asyncio.sleep(_RETRY_SECONDS)
                    continue
                relays.create_task(self._pass_on(client)).add_done_callback(lambda _: places.release())

    async def _pass_on(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            theirs = await asyncio.open_unix_connection(sock=client)
            try:
                own = await asyncio.open_unix_connection(str(self._path))
            except BaseException:
                theirs[1].close()
                raise
            try:
                async with asyncio.TaskGroup() as both:
                    both.create_task(_copy(theirs[0], own[1]))
                    both.create_task(_copy(own[0], theirs[1]))
            finally:
                theirs[1].close()
                own[1].close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy both directions until one ends; then end the other one, since gRPC has no half-closed connections."""
    with contextlib.suppress(OSError):
        while piece := await reader.read(_PIECE):
            writer.write(piece)
            await writer.drain()
    writer.close()
