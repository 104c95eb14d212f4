"""Logs in to a registry: basic authentication, and tokens (distribution's "Token Authentication Specification")."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import msgspec

from host import untrusted_json
from host.errors import PermissionDeniedError
from host.untrusted_json import JsonError
from images.registry.credentials import Credentials
from images.registry.redirects import address

CLIENT_ID = "podkeel"
_MAX_TOKEN_BYTES = 256 << 10
_SCHEME = re.compile(r"[\s,]*([A-Za-z0-9._~+/-]+)(?:\s+|(?=,)|\Z)")
_PARAMETER = re.compile(r'\s*,?\s*([A-Za-z0-9_-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,]+))')


@dataclass(frozen=True, slots=True)
class Challenge:
    """One challenge of a WWW-Authenticate header: its scheme in lower case and its parameters."""

    scheme: str
    parameters: dict[str, str]


def parse_challenges(headers: list[str]) -> list[Challenge]:
    """The challenges in all WWW-Authenticate headers of a response (RFC 9110, section 11.6.1)."""
    challenges: list[Challenge] = []
    for header in headers:
        position = 0
        while (scheme := _SCHEME.match(header, position)) is not None:
            position = scheme.end()
            parameters: dict[str, str] = {}
            while (match := _PARAMETER.match(header, position)) is not None:
                quoted, plain = match[2], match[3]
                parameters[match[1].lower()] = re.sub(r"\\(.)", r"\1", quoted) if plain is None else plain
                position = match.end()
            challenges.append(Challenge(scheme[1].lower(), parameters))
            comma = header.find(",", position)
            if comma < 0:
                break
            position = comma + 1
    return challenges


class _TokenAnswer(msgspec.Struct):
    token: str | None = None
    access_token: str | None = None


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """A request to the token server: a GET, or with ``form`` a POST. ``instead`` is for servers that refuse GET."""

    url: str
    headers: dict[str, str]
    form: dict[str, str] | None
    instead: TokenRequest | None = None


def answer_directly(challenges: list[Challenge], credentials: Credentials | None) -> str | None:
    """An Authorization header from the credentials alone; None if a token must be fetched or no challenge fits."""
    if credentials is None:
        return None
    if credentials.registry_token:
        return _bearer(credentials.registry_token, "the registry token that was given")
    basic = any(challenge.scheme == "basic" for challenge in challenges)
    return credentials.basic() if basic and _bearer_challenge(challenges) is None else None


def _bearer_challenge(challenges: list[Challenge]) -> Challenge | None:
    """The first bearer challenge that names a token server."""
    bearers = (challenge for challenge in challenges if challenge.scheme == "bearer")
    return next((challenge for challenge in bearers if challenge.parameters.get("realm")), None)


def token_request(
    challenges: list[Challenge], credentials: Credentials | None, scope: str, *, secure: bool
) -> TokenRequest:
    """The request for an access token that the challenges require. ``scope`` is used if they name none.

    Raises PermissionDeniedError if no challenge requires a token, or if credentials for a registry with TLS
    (``secure``) would have to be sent without TLS.
    """
    bearer = _bearer_challenge(challenges)
    if bearer is None:
        schemes = ", ".join(sorted({challenge.scheme for challenge in challenges})) or "no scheme it names"
        raise PermissionDeniedError(f"it asks for authentication ({schemes}) and no credentials for it were given")
    try:
        realm = address(bearer.parameters["realm"])
    except ValueError:
        named = bearer.parameters["realm"][:200]
        raise PermissionDeniedError(f"it names a token server that is no address: {named!r}") from None
    url = urlsplit(realm)._replace(fragment="")
    if secure and url.scheme != "https" and credentials is not None:
        raise PermissionDeniedError(
            f"it requires sending the credentials unencrypted to {url.netloc}, which is refused"
        )
    about = {"scope": bearer.parameters.get("scope") or scope, "service": bearer.parameters.get("service", "")}
    if credentials is not None and credentials.identity_token:
        form = {"grant_type": "refresh_token", "refresh_token": credentials.identity_token, **about}
        return TokenRequest(realm, {}, {**form, "client_id": CLIENT_ID})
    query = [(name, value) for name, value in parse_qsl(url.query, keep_blank_values=True) if not about.get(name)]
    query += [("scope", one) for one in about["scope"].split()]  # one parameter each, as in docker and containerd
    query += [("service", about["service"])] if about["service"] else []
    asked = urlunsplit(url._replace(query=urlencode(query, errors="surrogateescape")))
    pair = credentials.user_and_password() if credentials is not None else None
    if credentials is None or pair is None:
        return TokenRequest(asked, {}, None)
    form = {"grant_type": "password", "username": pair[0], "password": pair[1], **about, "client_id": CLIENT_ID}
    return TokenRequest(asked, {"Authorization": credentials.basic() or ""}, None, TokenRequest(realm, {}, form))


def read_token(content: bytes) -> str:
    """The Authorization header from a token server's answer. PermissionDeniedError if it holds no token."""
    try:
        answer = untrusted_json.decode(content, _TokenAnswer)
    except JsonError as error:
        raise PermissionDeniedError(f"the token server's answer is not understood: {error}") from error
    token = answer.token or answer.access_token
    if not token:
        raise PermissionDeniedError("the token server's answer holds no token")
    return _bearer(token, "the token server's token")


def _bearer(token: str, what: str) -> str:
    if not token.isascii() or not token.isprintable() or len(token) > _MAX_TOKEN_BYTES:
        raise PermissionDeniedError(
            f"{what} is longer than {_MAX_TOKEN_BYTES} bytes or has characters that no header may have"
        )
    return f"Bearer {token}"
