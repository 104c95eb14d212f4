"""Chooses protocol and version for an upgrade request, answers it, and makes the session that serves it."""

from __future__ import annotations

from collections.abc import Sequence

from cri.streaming.httpstream.connection import StreamConnection
from cri.streaming.httpstream.http_upgrade import SPDY, WEBSOCKET, HttpError, HttpUpgrade, UpgradeRequest
from cri.streaming.httpstream.websocket_link import ChannelSocket
from cri.streaming.session import (
    Session,
    SpdyCommandSession,
    SpdyPortForwardSession,
    Surroundings,
    TunnelSession,
    WebSocketCommandSession,
    WebSocketPortForwardSession,
)
from cri.streaming.tokens import PortForwardRequest, StreamRequest

_VERSION_HEADER = "x-stream-protocol-version"
_COMMAND_VERSIONS = {"v4.channel.k8s.io": 4, "v3.channel.k8s.io": 3, "v2.channel.k8s.io": 2, "channel.k8s.io": 1}
_PORT_FORWARD = "portforward.k8s.io"
_TUNNEL = "SPDY/3.1+portforward.k8s.io"
_WEBSOCKET_PROTOCOLS = (
    "v5.channel.k8s.io",
    "v4.channel.k8s.io",
    "v5.base64.channel.k8s.io",
    "v4.base64.channel.k8s.io",
    "channel.k8s.io",
    "base64.channel.k8s.io",
)


def accept(
    request: UpgradeRequest,
    promised: StreamRequest,
    connection: StreamConnection,
    upgrade: HttpUpgrade,
    surroundings: Surroundings,
) -> Session:
    """Answer the request with 101 and return its session; raises HttpError if it asks for no supported protocol."""
    if request.protocol == SPDY and request.method in ("POST", "GET"):
        return _accept_spdy(request, promised, connection, upgrade, surroundings)
    if request.protocol == WEBSOCKET and request.method == "GET":
        if isinstance(promised, PortForwardRequest):
            return _accept_websocket_port_forward(request, promised, connection, surroundings)
        chosen = _choose(request.listed("sec-websocket-protocol"), _WEBSOCKET_PROTOCOLS)
        sockets = _accept_channels(request, chosen, connection, surroundings)
        version = 4 if chosen is not None and chosen.startswith(("v4.", "v5.")) else 1
        return WebSocketCommandSession(sockets, surroundings, promised, version)
    raise HttpError(400, "streams need an upgrade: POST with Upgrade: SPDY/3.1, or GET with Upgrade: websocket")


def _accept_spdy(
    request: UpgradeRequest,
    promised: StreamRequest,
    connection: StreamConnection,
    upgrade: HttpUpgrade,
    surroundings: Surroundings,
) -> Session:
    offered = request.listed(_VERSION_HEADER)
    spoken = [_PORT_FORWARD] if isinstance(promised, PortForwardRequest) else list(_COMMAND_VERSIONS)
    # We choose the highest version, regardless of the client's order.
    chosen = _choose(spoken, offered) if offered else None
    answer = [("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1")]
    if chosen is not None:
        answer.append(("X-Stream-Protocol-Version", chosen))
    connection.write(upgrade.switch(answer))
    if isinstance(promised, PortForwardRequest):
        return SpdyPortForwardSession(connection, surroundings, promised)
    version = _COMMAND_VERSIONS[chosen] if chosen is not None else 1
    return SpdyCommandSession(connection, surroundings, promised, version)


def _accept_websocket_port_forward(
    request: UpgradeRequest, promised: PortForwardRequest, connection: StreamConnection, surroundings: Surroundings
) -> Session:
    chosen = _choose(request.listed("sec-websocket-protocol"), (_TUNNEL, *_WEBSOCKET_PROTOCOLS))
    if chosen == _TUNNEL:
        session = TunnelSession(connection, surroundings, promised)
        session.accept(request, _TUNNEL)
        return session
    ports = _requested_ports(request) or promised.ports
    if not ports:
        raise HttpError(400, "port forward over WebSocket needs the ports in the query: ?port=8080")
    sockets = _accept_channels(request, chosen, connection, surroundings)
    return WebSocketPortForwardSession(sockets, surroundings, promised.sandbox_id, ports)


def _accept_channels(
    request: UpgradeRequest, chosen: str | None, connection: StreamConnection, surroundings: Surroundings
) -> ChannelSocket:
    name = chosen or ""
    sockets = ChannelSocket(connection, surroundings.cancel, use_base64="base64" in name, closes=name.startswith("v5."))
    sockets.accept(request, chosen)
    return sockets


def _choose(preferred: Sequence[str], others: Sequence[str]) -> str | None:
    """The first of ``preferred`` that is in ``others``, None if it is empty; raises HttpError 403 if none is."""
    if not preferred:
        return None
    for name in preferred:
        if name in others:
            return name
    raise HttpError(403, f"no common protocol: {', '.join(preferred)} on one side, {', '.join(others)} on the other")


def _requested_ports(request: UpgradeRequest) -> tuple[int, ...]:
    texts = request.query.get("port") or request.listed("port")
    numbers = [part.strip() for text in texts for part in text.split(",")]
    if not all(number.isascii() and number.isdigit() and 0 < int(number) < 65536 for number in numbers):
        raise HttpError(400, f"not ports: {', '.join(numbers)}")
    return tuple(int(number) for number in numbers)
