"""The address of a streaming server, and the limits that it sets for its clients."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from host.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """Address and limits of a streaming server; times are in seconds.

    ``port`` 0 means a free one. A stream without data in either direction for ``idle_timeout`` is ended (0: never).
    ``close_patience`` is how long a client may take to read the last bytes of an ended stream. ``creation_timeout`` is
    the maximum time for a client to open all its streams. A connection must send its request, with a token, within
    ``request_timeout``. If more than ``max_pending`` connections have not sent one, the server closes the oldest of
    these. It serves at most ``max_connections`` clients at a time. The TLS paths are PEM files; all three are needed to
    listen on an address other than loopback.
    """

    host: str = "127.0.0.1"
    port: int = 0
    idle_timeout: float = 4 * 3600.0
    creation_timeout: float = 30.0
    request_timeout: float = 10.0
    max_pending: int = 256
    close_patience: float = 600.0
    token_lifetime: float = 60.0
    max_tokens: int = 1000
    max_connections: int = 2000
    max_streams: int = 2000
    tls_certificate: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None

    @property
    def uses_tls(self) -> bool:
        """Whether connections are encrypted."""
        return self.tls_certificate is not None

    def check(self) -> None:
        """Raise InvalidArgumentError if the address and the TLS files do not fit together."""
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise InvalidArgumentError("streaming TLS needs a certificate and its key: name both or neither")
        if self.tls_client_ca is not None and not self.uses_tls:
            raise InvalidArgumentError("a streaming client CA is only of use with a certificate and a key")
        if not self._is_loopback() and not (self.uses_tls and self.tls_client_ca is not None):
            raise InvalidArgumentError(
                f"streaming address {self.host} is not loopback: set a TLS certificate, key and client CA, "
                "or listen on 127.0.0.1"
            )

    def _is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
