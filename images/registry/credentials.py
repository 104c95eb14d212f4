"""What a caller may give to log in to a registry (the CRI's AuthConfig)."""

from __future__ import annotations

import base64
import binascii

import msgspec

from host.errors import InvalidArgumentError

_SHOWN = 100  # characters of a name


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
        """A description of them, without secrets."""
        pair = self.user_and_password() if not self.registry_token else None
        if pair is not None:
            name = pair[0][:_SHOWN].encode(errors="surrogateescape").decode(errors="replace")
            return f"user {''.join(character if character.isprintable() else '?' for character in name)}"
        return "a registry token" if self.registry_token else "an identity token"

    def user_and_password(self) -> tuple[str, str] | None:
        """User and password, from any field that has them; None if there are none. A malformed ``auth`` is
        InvalidArgumentError.

        Bytes that are not UTF-8 become surrogates.
        """
        if self.username:
            return self.username, self.password
        if not self.auth:
            return None
        try:
            # As docker and containerd read it: lines may be broken, and the bytes go to the registry as they are.
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
        """``server_address`` as ``host`` or ``host:port``; empty if not given."""
        return self.server_address.rpartition("://")[2].partition("/")[0]
