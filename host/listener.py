"""A TCP listener for unknown clients.

A connection must be admitted within some seconds. If too many wait, the oldest is closed. So idle clients do not keep
others out (as sshd's LoginGraceTime and MaxStartups).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import socket
import ssl
from collections.abc import Callable

from host.errors import InvalidArgumentError

# Connections that are accepted in one turn of the loop. Data of earlier connections is read between two turns.
_ACCEPTS_AT_ONCE = 32
# Seconds until the next try if no descriptor is left.
_RETRY_SECONDS = 0.2
_BACKLOG = 512
_log = logging.getLogger("podkeel.listener")

_NO_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class PendingConnection:
    """A connection that is not admitted yet. Its protocol calls ``admit``, or ``forget`` once it is closed."""

    def __init__(
        self, listener: Listener, accepted: socket.socket, task: asyncio.Task[asyncio.Transport], grace: float
    ) -> None:
        self._listener = listener
        self._accepted = accepted
        self._task = task
        self._timer = asyncio.get_running_loop().call_later(grace, self.drop)
        task.add_done_callback(self._on_connected)

    def admit(self) -> None:
        """Admit the connection: the listener no longer closes it."""
        self.forget()

    def forget(self) -> None:
        """No longer count the connection among those that wait."""
        self._timer.cancel()
        self._listener.forget(self)

    def drop(self) -> None:
        """Close the connection at once."""
        self.forget()
        if self._task.done() and not self._task.cancelled() and self._task.exception() is None:
            self._task.result().abort()
        else:
            self._task.cancel()

    def _on_connected(self, task: asyncio.Task[asyncio.Transport]) -> None:
        if task.cancelled() or task.exception() is not None:  # the client disconnected, or does not use TLS
            self._accepted.close()
            self.forget()


class Listener:
    """Accepts connections for ``make_protocol``, which is called for each with its ``PendingConnection``.

    A connection that is not admitted within ``grace`` seconds is closed (the TLS handshake counts). If more than
    ``pending_limit`` wait to be admitted, the oldest is closed. ``name`` is for the log.
    """

    def __init__(
        self,
        name: str,
        make_protocol: Callable[[PendingConnection], asyncio.Protocol],
        *,
        tls: ssl.SSLContext | None = None,
        grace: float = 10.0,
        pending_limit: int = 256,
    ) -> None:
        self._make_protocol = make_protocol
        self._name = name
        self._tls = tls
        self._grace = grace
        self._limit = max(8, min(pending_limit, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8))
        self._pending: dict[PendingConnection, None] = {}
        self._sockets: list[socket.socket] = []
        self._retries: dict[socket.socket, asyncio.TimerHandle] = {}

    async def start(self, host: str, port: int) -> int:
        """Listen on the addresses of ``host``. Returns the port, which the system chooses for 0. Raises OSError."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        try:
            for family, _, _, _, address in dict.fromkeys(found):
                wanted = self.port if self._sockets else port  # for 0: one port for all addresses
                self._sockets.append(_listening(family, (address[0], wanted, *address[2:])))
        except BaseException:
            self.close()
            raise
        for listening in self._sockets:
            loop.add_reader(listening, self._accept, listening)
        return self.port

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._sockets[0].getsockname()[1])

    @property
    def pending(self) -> int:
        """The number of connections that are not admitted yet."""
        return len(self._pending)

    def close(self) -> None:
        """Accept no more connections, and close those that are not admitted."""
        loop = asyncio.get_running_loop()
        for timer in self._retries.values():
            timer.cancel()
        for listening in self._sockets:
            loop.remove_reader(listening)
            listening.close()
        self._sockets.clear()
        for connection in list(self._pending):
            connection.drop()

    def forget(self, connection: PendingConnection) -> None:
        """No longer count a connection."""
        self._pending.pop(connection, None)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(_ACCEPTS_AT_ONCE):
            try:
                accepted, _ = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                break
            except OSError as error:
                if error.errno in _NO_RESOURCES:
                    self._wait_for_resources(listening, error)
                return
            self._take(accepted)
        if self._retries.pop(listening, None) is not None:
            _log.warning("%s: connections are accepted again", self._name)

    def _take(self, accepted: socket.socket) -> None:
        accepted.setblocking(False)
        while len(self._pending) >= self._limit:
            next(iter(self._pending)).drop()
        connection: PendingConnection
        task = asyncio.get_running_loop().create_task(self._connect(accepted, lambda: connection))
        connection = PendingConnection(self, accepted, task, self._grace)
        self._pending[connection] = None

    async def _connect(self, accepted: socket.socket, connection: Callable[[], PendingConnection]) -> asyncio.Transport:
        timeout = self._grace if self._tls is not None else None
        transport, _ = await asyncio.get_running_loop().connect_accepted_socket(
            lambda: self._make_protocol(connection()), accepted, ssl=self._tls, ssl_handshake_timeout=timeout
        )
        return transport

    def _wait_for_resources(self, listening: socket.socket, error: OSError) -> None:
        """Close the connection that waits longest, and try again after a moment. Log only the first failure."""
        loop = asyncio.get_running_loop()
        if listening not in self._retries:
            _log.error("%s: connections cannot be accepted: %s", self._name, error.strerror)
        if self._pending:
            next(iter(self._pending)).drop()
        loop.remove_reader(listening)
        again = loop.call_later(_RETRY_SECONDS, loop.add_reader, listening, self._accept, listening)
        self._retries[listening] = again


def tls_context(subject: str, certificate: str, key: str, client_ca: str) -> ssl.SSLContext | None:
    """The TLS context of a server with these PEM files; None if no file is given. With ``client_ca``, clients need a
    certificate that it has signed. Raises InvalidArgumentError, whose message begins with ``subject``.
    """
    if not certificate and not key:
        if client_ca:
            raise InvalidArgumentError(
                f"{subject}: tls_client_ca is only of use with a certificate and a key: give both too"
            )
        return None
    if not certificate or not key:
        raise InvalidArgumentError(f"{subject}: tls_certificate and tls_key belong together: give both, or neither")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise InvalidArgumentError(
            f"{subject}: certificate {certificate} with key {key} cannot be used: {error}"
        ) from error
    if client_ca:
        try:
            context.load_verify_locations(client_ca)
        except (OSError, ssl.SSLError) as error:
            raise InvalidArgumentError(f"{subject}: tls_client_ca {client_ca} cannot be used: {error}") from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _listening(family: int, address: tuple[object, ...]) -> socket.socket:
    # asyncio sets TCP_NODELAY only if the socket was made with the number of the protocol.
    listening = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except BaseException:
        listening.close()
        raise
    return listening
