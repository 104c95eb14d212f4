"""The client's side of the HTTP request that upgrades a connection to SPDY."""

from __future__ import annotations

from collections.abc import Sequence

import h11

from host.errors import PodkeelError

_MAX_HEAD = 64 * 1024
_MAX_REASON = 64 * 1024


class Upgrade:
    """One request to change to SPDY/3.1, and the answer to it (RFC 9110, section 7.8)."""

    def __init__(self) -> None:
        self._connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD)
        self._status = ""
        self._reason = b""
        self.answered = False

    def request(self, path: str, host: str, protocols: Sequence[str]) -> bytes:
        """The bytes of the request."""
        headers = [("Host", host), ("User-Agent", "podkeel"), ("Content-Length", "0")]
        headers += [("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1")]
        headers += [("X-Stream-Protocol-Version", protocol) for protocol in protocols]
        head = self._connection.send(h11.Request(method="POST", target=path, headers=headers)) or b""
        return head + (self._connection.send(h11.EndOfMessage()) or b"")

    def receive(self, data: bytes) -> bytes | None:
        """Take bytes of the answer; b"" means its end.

        Returns the first bytes of the new protocol once the answer is complete, None before. Raises PodkeelError, with
        the server's reason, if the server refuses.
        """
        self.answered = self.answered or bool(data)
        try:
            self._connection.receive_data(data)
            while (event := self._connection.next_event()) is not h11.NEED_DATA:
                if isinstance(event, h11.InformationalResponse) and event.status_code == 101:
                    return self._connection.trailing_data[0]
                if isinstance(event, h11.Response):
                    self._status = f"{event.status_code} {event.reason.decode('latin-1')}".strip()
                elif isinstance(event, h11.Data):
                    self._reason = (self._reason + event.data)[:_MAX_REASON]
                elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                    raise self._refusal()
        except h11.RemoteProtocolError as error:
            raise self._refusal(str(error) if self.answered else "no answer") from error
        return None

    def _refusal(self, why: str = "no reason is given") -> PodkeelError:
        said = self._reason.decode(errors="replace").strip()
        return PodkeelError(f"the agent refused the stream: {said or self._status or why}")
