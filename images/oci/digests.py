"""Digests in the form of the OCI image specification: ``algorithm:hex``."""

from __future__ import annotations

import hashlib
import re
from typing import Protocol

from host.errors import InvalidArgumentError

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")


class Hasher(Protocol):
    """The interface of hashlib's objects."""

    def update(self, data: bytes, /) -> None:
        """Add bytes to the hash."""

    def hexdigest(self) -> str:
        """The digest of all bytes so far, as hexadecimal digits."""


def is_digest(text: str) -> bool:
    """Whether ``text`` is a complete digest of a supported algorithm."""
    return _DIGEST.fullmatch(text) is not None


def check_digest(text: str, subject: str) -> str:
    """Return ``text`` if it is a digest; otherwise raise InvalidArgumentError naming ``subject``."""
    if not is_digest(text):
        raise InvalidArgumentError(f"{subject}: {text[:100]!r} is not a sha256 or sha512 digest")
    return text


def hasher(digest: str = "") -> Hasher:
    """A new hash object for the algorithm of ``digest``; sha256 if that is empty."""
    return hashlib.new(digest.partition(":")[0] or "sha256")


def digest_of(data: bytes, like: str = "") -> str:
    """The digest of ``data``, with the algorithm of ``like`` (sha256 if empty)."""
    algorithm = like.partition(":")[0] or "sha256"
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


def verify(data: bytes, digest: str, subject: str) -> None:
    """Raise InvalidArgumentError unless ``data`` has that digest."""
    actual = digest_of(data, digest)
    if actual != digest:
        raise InvalidArgumentError(f"{subject} is broken: its digest is {actual}, expected {digest}")


def chain_ids(diff_ids: tuple[str, ...]) -> tuple[str, ...]:
    """The chain ID of each layer (OCI image specification, "Layer ChainID"). It covers all layers up to that one."""
    chain: list[str] = []
    for diff_id in diff_ids:
        chain.append(digest_of(f"{chain[-1]} {diff_id}".encode()) if chain else diff_id)
    return tuple(chain)
