"""The credentials that a client may pass to log in to a registry (the CRI's AuthConfig)."""

from __future__ import annotations

import base64
import binascii

import msgspec

from host.errors import InvalidArgumentError

_SHOWN = 100  # characters of a user name in messages


class Credentials(msgspec.Struct, frozen=True):
    """User and password, or both in ``auth`` (base64 of ``user:password``), or one of two kinds of token.

    ``identity_token`` is exchanged for access tokens at the token server. ``registry_token`` is an access token itself.
    They are sent only to ``server_address``, or to the image's own registry if that is empty.
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
        """A description of them, without secrets."""
        pair = self.user_and_password() if not self.registry_token else None
        if pair is not None:
            name = pair[0][:_SHOWN].encode(errors="surrogateescape").decode(errors="replace")
            return f"user {''.join(character if character.isprintable() else '?' for character in name)}"
        return "a registry token" if self.registry_token else "an identity token"

    def user_and_password(self) -> tuple[str, str] | None:
        """User and password, from the fields that hold them; None if there are none.

        Raises InvalidArgumentError for a malformed ``auth``. Bytes that are not UTF-8 become surrogates.
        """
        if self.username:
            return self.username, self.password
        if not self.auth:
            return None
        try:
            # As in docker and containerd: line breaks are allowed, and the bytes are sent to the registry unchanged.
            decoded = base64.b64decode("".join(self.auth.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise InvalidArgumentError("registry credentials: auth is not base64 of user:password") from error
        user, colon, password = decoded.decode(errors="surrogateescape").partition(":")
        if not colon:
            raise InvalidArgumentError("registry credentials: auth is not base64 of user:password")
        return user, password.strip("\0")

    def basic(self) -> str | None:
        """The value of an Authorization header for basic authentication; None without user and password."""
        pair = self.user_and_password()
        return (
            None
            if pair is None
            else "Basic " + base64.b64encode(":".join(pair).encode(errors="surrogateescape")).decode()
        )

    def server_host(self) -> str:
        """``server_address`` as ``host`` or ``host:port``; empty if not set."""
        return self.server_address.rpartition("://")[2].partition("/")[0]
