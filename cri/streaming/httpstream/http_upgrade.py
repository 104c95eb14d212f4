"""The HTTP/1.1 request that a streaming connection begins with, and the answers to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    import h11

SPDY = "spdy/3.1"
WEBSOCKET = "websocket"
_MAX_REQUEST = 64 * 1024


class HttpError(Exception):
    """The request is answered with this status and text, and the connection closed."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


@dataclass(frozen=True, slots=True)
class UpgradeRequest:
    """A request that asks for another protocol; ``protocol`` is in lower case, None where none is asked for."""

    method: str
    path: str
    target: str
    protocol: str | None
    headers: tuple[tuple[str, str], ...]
    query: dict[str, list[str]] = field(default_factory=dict)

    def listed(self, name: str) -> list[str]:
        """The comma-separated values of all headers of that (lower-case) name."""
        values = [value for key, value in self.headers if key == name]
        return [item for value in values for item in (part.strip() for part in value.split(",")) if item]


class HttpUpgrade:
    """The server's side of one request."""

    def __init__(self) -> None:
        import h11

        self._h11 = h11
        self._connection = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_REQUEST)
        self._request: h11.Request | None = None

    def receive(self, data: bytes) -> UpgradeRequest | None:
        """Take bytes; returns the request once it is complete. Raises HttpError for anything else."""
        h11 = self._h11
        try:
            self._connection.receive_data(data)
            while True:
                event = self._connection.next_event()
                if event is h11.NEED_DATA:
                    return None
                if isinstance(event, h11.Request):
                    self._request = event
                elif isinstance(event, h11.EndOfMessage) and self._request is not None:
                    return _read(self._request)
                elif isinstance(event, h11.Data):
                    raise HttpError(400, "a streaming request has no body")
                else:
                    raise HttpError(400, "not a request")
        except h11.RemoteProtocolError as error:
            raise HttpError(error.error_status_hint, str(error)) from error

    def switch(self, headers: Sequence[tuple[str, str]]) -> bytes:
        """The bytes of ``101 Switching Protocols``."""
        response = self._h11.InformationalResponse(
            status_code=101, headers=list(headers), reason=b"Switching Protocols"
        )
        return self._connection.send(response) or b""

    def refuse(self, error: HttpError) -> bytes:
        """The bytes of an answer that ends the connection."""
        if self._connection.our_state not in (self._h11.IDLE, self._h11.SEND_RESPONSE):
            return b""
        body = (error.text + "\n").encode()
        headers = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))]
        response = self._h11.Response(status_code=error.status, headers=[*headers, ("Connection", "close")])
        parts = (response, self._h11.Data(data=body), self._h11.EndOfMessage())
        return b"".join(self._connection.send(part) or b"" for part in parts)

    @property
    def trailing_data(self) -> bytes:
        """The bytes after the request: the first bytes of the new protocol."""
        return self._connection.trailing_data[0]


def _read(request: h11.Request) -> UpgradeRequest:
    headers = tuple((name.decode("ascii"), value.decode("latin-1")) for name, value in request.headers)
    target = request.target.decode("ascii", "replace")
    parts = urlsplit(target)
    plain = UpgradeRequest(request.method.decode(), parts.path, target, None, headers, parse_qs(parts.query))
    if "upgrade" not in (token.lower() for token in plain.listed("connection")):
        return plain
    return replace(plain, protocol=next((name.lower() for name in plain.listed("upgrade")), None))
