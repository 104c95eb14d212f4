"""Digests as the OCI image specification writes them: ``algorithm:hex``."""

from __future__ import annotations

import hashlib
import re
from typing import Protocol

from host.errors import InvalidArgumentError

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")


class Hasher(Protocol):
    """The interface of hashlib's objects."""

    def update(self, data: bytes, /) -> None:
        """Take in more bytes."""

    def hexdigest(self) -> str:
        """The digest so far."""


def is_digest(text: str) -> bool:
    """Whether ``text`` is a digest of a known algorithm, in full."""
    return _DIGEST.fullmatch(text) is not None


def check_digest(text: str, subject: str) -> str:
    """``text`` itself if it is a digest; otherwise InvalidArgumentError naming ``subject``."""
    if not is_digest(text):
        raise InvalidArgumentError(f"{subject}: {text[:100]!r} is not a sha256 or sha512 digest")
    return text


def hasher(digest: str = "") -> Hasher:
    """A fresh hash of the algorithm of ``digest``, sha256 if that is empty."""
    return hashlib.new(digest.partition(":")[0] or "sha256")


def digest_of(data: bytes, like: str = "") -> str:
    """The digest of ``data``, with the algorithm of ``like`` (sha256 if empty)."""
    algorithm = like.partition(":")[0] or "sha256"
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


def verify(data: bytes, digest: str, subject: str) -> None:
    """InvalidArgumentError unless ``data`` has that digest."""
    actual = digest_of(data, digest)
    if actual != digest:
        raise InvalidArgumentError(f"{subject} is broken: its digest is {actual}, expected {digest}")


def chain_ids(diff_ids: tuple[str, ...]) -> tuple[str, ...]:
    """The chain id of each layer: the digest of everything up to it (OCI image specification, "Layer ChainID")."""
    chain: list[str] = []
    for diff_id in diff_ids:
        chain.append(digest_of(f"{chain[-1]} {diff_id}".encode()) if chain else diff_id)
    return tuple(chain)
