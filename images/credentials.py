"""What a caller may give to be let in at a registry (the CRI's AuthConfig)."""

from __future__ import annotations

import base64
import binascii

import msgspec

from host.errors import InvalidArgumentError


class Credentials(msgspec.Struct, frozen=True):
    """User and password, the same in ``auth`` (base64 of ``user:password``), or a token of one of two kinds.

    ``identity_token`` is exchanged for access tokens at the token server; ``registry_token`` is an access token itself.
    They belong to ``server_address``, or to the image's own registry if that is empty, and go nowhere else.
    """

    username: str = ""
    password: str = ""
    auth: str = ""
    identity_token: str = ""
    registry_token: str = ""
    server_address: str = ""

    def __repr__(self) -> str:
        return f"Credentials({self.username or 'token'}@{self.server_address or '*'})"

    def described(self) -> str:
        """What they are, without anything secret."""
        pair = self.user_and_password() if not self.registry_token else None
        if pair is not None:
            return f"user {pair[0]}"
        return "a registry token" if self.registry_token else "an identity token"

    def user_and_password(self) -> tuple[str, str] | None:
        """Both, from wherever they were given; None if there are none. A malformed ``auth`` is InvalidArgumentError."""
        if self.username:
            return self.username, self.password
        if not self.auth:
            return None
        try:
            user, colon, password = base64.b64decode(self.auth, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError) as error:
            raise InvalidArgumentError("registry credentials: auth is not base64 of user:password") from error
        if not colon:
            raise InvalidArgumentError("registry credentials: auth is not base64 of user:password")
        return user, password.rstrip("\0")

    def basic(self) -> str | None:
        """The value of an Authorization header for basic authentication; None without user and password."""
        pair = self.user_and_password()
        return None if pair is None else "Basic " + base64.b64encode(f"{pair[0]}:{pair[1]}".encode()).decode()

    def server_host(self) -> str:
        """``server_address`` as ``host`` or ``host:port``; empty if not given."""
        return self.server_address.rpartition("://")[2].partition("/")[0]
