"""The HTTP server that kubelet, kubectl and crictl connect to for exec, attach and port forward."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Sequence

from cri.streaming.backend import StreamBackend
from cri.streaming.handshake import accept
from cri.streaming.httpstream.connection import StreamConnection
from cri.streaming.httpstream.http_upgrade import HttpError, HttpUpgrade, UpgradeRequest
from cri.streaming.limits import StreamLimits
from cri.streaming.session import Session, Surroundings
from cri.streaming.tokens import AttachRequest, ExecRequest, PortForwardRequest, StreamRequest, TokenTable
from host.errors import InvalidArgumentError, UnavailableError
from host.listener import Listener, PendingConnection

logger = logging.getLogger(__name__)

_PATHS: dict[type[StreamRequest], str] = {
    ExecRequest: "exec",
    AttachRequest: "attach",
    PortForwardRequest: "portforward",
}
_REACHABLE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
_STOPPING = "the node agent is stopping"
# Seconds that a stopping agent waits until clients have read the last bytes and disconnected.
_STOP_PATIENCE = 1.0


class StreamingServer:
    """Returns URLs and serves the streams of clients that connect to them."""

    def __init__(self, backend: StreamBackend, limits: StreamLimits | None = None) -> None:
        self._backend = backend
        self._limits = limits or StreamLimits()
        self._tokens = TokenTable(self._limits.token_lifetime, self._limits.max_tokens)
        self._listener: Listener | None = None
        self._port = 0
        self._visits: set[_Visit] = set()

    async def start(self) -> None:
        """Listen. Raises InvalidArgumentError for an address it must not or cannot listen on."""
        limits = self._limits
        limits.check()
        context = _tls_context(limits) if limits.uses_tls else None
        listener = Listener(
            "streaming server",
            lambda pending: StreamConnection(lambda connection: self._on_connection(connection, pending)),
            tls=context,
            grace=limits.request_timeout,
            pending_limit=limits.max_pending,
        )
        try:
            self._port = await listener.start(limits.host, limits.port)
        except OSError as error:
            where = f"{limits.host}:{limits.port}"
            reason = error.strerror or str(error)
            raise InvalidArgumentError(
                f"cannot listen for streams on {where}: {reason}: give this agent another streaming.address"
            ) from error
        self._listener = listener

    @property
    def served(self) -> int:
        """How many clients are served now."""
        return len(self._visits)

    async def close(self) -> None:
        """Accept no more clients, send the present ones the reason for the end, and wait for them."""
        if self._listener is None:
            return
        self._listener.close()
        visits = list(self._visits)
        for visit in visits:
            visit.cancel(_STOPPING)
        await asyncio.gather(*(visit.task for visit in visits), return_exceptions=True)
        self._listener = None

    def exec_url(
        self, container_id: str, command: Sequence[str], *, tty: bool, stdin: bool, stdout: bool, stderr: bool
    ) -> str:
        """The URL that runs ``command`` in the container, once.

        Raises InvalidArgumentError when no stream is asked for, or a terminal together with stderr.
        """
        if not command:
            raise InvalidArgumentError("exec: no command given")
        _check_streams("exec", tty=tty, stdin=stdin, stdout=stdout, stderr=stderr)
        return self._url(ExecRequest(container_id, tuple(command), tty, stdin, stdout, stderr))

    def attach_url(self, container_id: str, *, stdin: bool, tty: bool, stdout: bool, stderr: bool) -> str:
        """The URL that attaches to the container, once; errors as for ``exec_url``."""
        _check_streams("attach", tty=tty, stdin=stdin, stdout=stdout, stderr=stderr)
        return self._url(AttachRequest(container_id, tty, stdin, stdout, stderr))

    def port_forward_url(self, sandbox_id: str, ports: Sequence[int]) -> str:
        """The URL that reaches ports of the pod, once. Raises InvalidArgumentError for a number that is no port."""
        for port in ports:
            if not 0 < port < 65536:
                raise InvalidArgumentError(f"port forward: {port} is not a port; they go from 1 to 65535")
        return self._url(PortForwardRequest(sandbox_id, tuple(ports)))

    def _url(self, request: StreamRequest) -> str:
        if self._listener is None:
            raise UnavailableError("the streaming server is not running; try again once the agent is up")
        # Clients run on this node. The unspecified address (0.0.0.0, ::) is no address to connect to.
        host = _REACHABLE.get(self._limits.host, self._limits.host)
        shown = f"[{host}]" if ":" in host else host
        scheme = "https" if self._limits.uses_tls else "http"
        return f"{scheme}://{shown}:{self._port}/{_PATHS[type(request)]}/{self._tokens.issue(request)}"

    def _on_connection(self, connection: StreamConnection, pending: PendingConnection) -> None:
        visit = _Visit(connection, pending, self._backend, self._limits, tokens=self._tokens, admit=self._admit)
        self._visits.add(visit)
        visit.task.add_done_callback(lambda _: self._visits.discard(visit))

    def _admit(self, kind: str, token: str) -> StreamRequest:
        """The request of a token, for one more client. Raises HttpError."""
        promised = self._tokens.peek(token)
        if promised is None or _PATHS[type(promised)] != kind:
            raise HttpError(404, "no such stream, or its URL was used already or is older than a minute")
        if sum(visit.is_admitted for visit in self._visits) >= self._limits.max_connections:
            raise HttpError(503, "too many streaming connections; try again later")
        return promised


class _Visit:
    """One client from its connection to its end."""

    def __init__(
        self,
        connection: StreamConnection,
        pending: PendingConnection,
        backend: StreamBackend,
        limits: StreamLimits,
        *,
        tokens: TokenTable,
        admit: Callable[[str, str], StreamRequest],
    ) -> None:
        self._connection = connection
        self._pending = pending
        self._surroundings = Surroundings(backend, limits, self.cancel)
        self._limits = limits
        self._tokens = tokens
        self._admit = admit
        self._loop = asyncio.get_running_loop()
        self._upgrade = HttpUpgrade()
        self._session: asyncio.Future[Session] = self._loop.create_future()
        self._idle_timer: asyncio.TimerHandle | None = None
        self._reason = ""
        self.is_admitted = False
        connection.receiver = self._on_request_bytes
        connection.on_lost = lambda: self.cancel("the client is gone")
        self.task = self._loop.create_task(self._run())

    def cancel(self, reason: str) -> None:
        """End the streams, and send the client the reason."""
        self._reason = self._reason or reason
        self.task.cancel()

    def refuse(self, error: HttpError) -> None:
        """Answer with an error; the connection closes."""
        self._connection.write(self._upgrade.refuse(error))
        self._connection.receiver = lambda data: None
        if not self._session.done():
            self._session.set_exception(error)

    def _on_request_bytes(self, data: bytes) -> None:
        if self._session.done():
            return  # ended meanwhile
        try:
            request = self._upgrade.receive(data)
            if request is not None:
                session = self._accept(request)
                self._session.set_result(session)
                self._connection.receiver = session.receive
                session.receive(self._upgrade.trailing_data)
        except HttpError as error:
            self.refuse(error)

    def _accept(self, request: UpgradeRequest) -> Session:
        kind, _, token = request.path.removeprefix("/").partition("/")
        promised = self._admit(kind, token)
        session = accept(request, promised, self._connection, self._upgrade, self._surroundings)
        self._tokens.take(token)
        self._pending.admit()
        self.is_admitted = True
        return session

    async def _run(self) -> None:
        session: Session | None = None
        try:
            session = await self._session
            self._check_idleness()
            await session.run()
        except (HttpError, ConnectionResetError):
            pass
        except asyncio.CancelledError:
            if session is not None:
                session.abort(self._reason)
        except Exception:
            logger.exception("streaming: session failed")
            if session is not None:
                session.abort("internal error of the node agent; see its log")
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if session is not None:
            session.end()
        # The listener disconnects a client that was not admitted if it does not disconnect itself.
        try:
            await self._connection.close(_STOP_PATIENCE if self._reason == _STOPPING else self._limits.close_patience)
        finally:
            self._pending.forget()

    def _check_idleness(self) -> None:
        if not self._limits.idle_timeout:
            return
        due = self._connection.last_data + self._limits.idle_timeout
        if self._loop.time() >= due:
            self.cancel(f"no data passed for {self._limits.idle_timeout:g} s")
        else:
            self._idle_timer = self._loop.call_at(due, self._check_idleness)


def _check_streams(what: str, *, tty: bool, stdin: bool, stdout: bool, stderr: bool) -> None:
    if not (stdin or stdout or stderr):
        raise InvalidArgumentError(f"{what}: at least one of stdin, stdout and stderr must be asked for")
    if tty and stderr:
        raise InvalidArgumentError(f"{what}: a terminal has no separate stderr: ask for tty or for stderr")


def _tls_context(limits: StreamLimits) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    assert limits.tls_certificate is not None
    try:
        context.load_cert_chain(limits.tls_certificate, limits.tls_key)
        if limits.tls_client_ca is not None:
            context.load_verify_locations(limits.tls_client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise InvalidArgumentError(f"streaming TLS files cannot be used: {error}") from error
    return context
