"""Single-use tokens: each gives the request of an Exec, Attach or PortForward call to the client that connects."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from host.errors import LimitError

_TOKEN_BYTES = 16


@dataclass(frozen=True, slots=True)
class ExecRequest:
    """A command to run in a container, and which of its streams the client takes."""

    container_id: str
    command: tuple[str, ...]
    tty: bool
    stdin: bool
    stdout: bool
    stderr: bool


@dataclass(frozen=True, slots=True)
class AttachRequest:
    """A running container, and which streams of it the client takes."""

    container_id: str
    tty: bool
    stdin: bool
    stdout: bool
    stderr: bool


@dataclass(frozen=True, slots=True)
class PortForwardRequest:
    """A pod whose ports may be reached; ``ports`` may be empty, since clients name the port with each connection."""

    sandbox_id: str
    ports: tuple[int, ...]


StreamRequest = ExecRequest | AttachRequest | PortForwardRequest


class TokenTable:
    """Requests by token, each for one use within ``lifetime`` seconds, at most ``limit`` at a time."""

    def __init__(self, lifetime: float, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._lifetime = lifetime
        self._limit = limit
        self._clock = clock
        self._requests: dict[str, tuple[float, StreamRequest]] = {}

    def issue(self, request: StreamRequest) -> str:
        """A new token of 128 random bits; raises LimitError when too many wait for their client."""
        self._expire()
        if len(self._requests) >= self._limit:
            raise LimitError(f"{self._limit} streams wait for their clients to connect; try again in a minute")
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        self._requests[token] = (self._clock() + self._lifetime, request)
        return token

    def peek(self, token: str) -> StreamRequest | None:
        """The request of a valid token; None for another one."""
        self._expire()
        entry = self._requests.get(token)
        return entry[1] if entry is not None else None

    def take(self, token: str) -> StreamRequest | None:
        """Like ``peek``; the token cannot be used again."""
        request = self.peek(token)
        self._requests.pop(token, None)
        return request

    def _expire(self) -> None:
        now = self._clock()
        # Every token is valid for the same time, so the oldest are first.
        while self._requests and (oldest := next(iter(self._requests.items())))[1][0] <= now:
            del self._requests[oldest[0]]
