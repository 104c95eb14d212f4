"""Parses and normalises image references, with Docker Hub's short names (distribution's reference grammar)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from host.errors import InvalidArgumentError
from images.oci.digests import is_digest

DEFAULT_DOMAIN = "docker.io"
_OTHER_NAMES_OF_DEFAULT = ("index.docker.io", "registry-1.docker.io", "registry.hub.docker.com")
_MAX_NAME_LENGTH = 255

_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_DOMAIN = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:.]+\])(?::[0-9]+)?")
_COMPONENT = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_HEX_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Reference:
    """A full image name: registry domain, repository path, and a tag, a digest or both."""

    domain: str
    path: str
    tag: str = ""
    digest: str = ""

    @property
    def repository(self) -> str:
        """``domain/path``."""
        return f"{self.domain}/{self.path}"

    @property
    def tagged(self) -> str:
        """``domain/path:tag``; empty without a tag."""
        return f"{self.repository}:{self.tag}" if self.tag else ""

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.repository}{tag}{digest}"


def parse(text: str) -> Reference:
    """The full form of ``text``: ``busybox`` is ``docker.io/library/busybox:latest``.

    A name with neither tag nor digest gets the tag ``latest``. Raises InvalidArgumentError naming the invalid part.
    """
    if "://" in text:
        raise InvalidArgumentError(f"image reference {text!r}: leave out the scheme ({text.partition('://')[0]}://)")
    name, at, digest = text.partition("@")
    if at and not is_digest(digest):
        raise InvalidArgumentError(f"image reference {text!r}: {digest!r} is not a sha256 or sha512 digest")
    head, slash, last = name.rpartition("/")
    last, colon, tag = last.partition(":")
    if colon and not _TAG.fullmatch(tag):
        raise InvalidArgumentError(f"image reference {text!r}: {tag!r} is not a valid tag")
    domain, path = _split_domain(head + slash + last)
    _check_name(text, domain, path)
    if not tag and not digest:
        tag = "latest"
    return Reference(domain, path, tag, digest)


def _split_domain(name: str) -> tuple[str, str]:
    first, slash, rest = name.partition("/")
    # The first component is a registry only if it cannot be the first part of a name on Docker Hub.
    if slash and ("." in first or ":" in first or first == "localhost" or first != first.lower()):
        domain, path = first, rest
    else:
        domain, path = DEFAULT_DOMAIN, name
    if domain in _OTHER_NAMES_OF_DEFAULT:
        domain = DEFAULT_DOMAIN
    if domain == DEFAULT_DOMAIN and "/" not in path:
        path = f"library/{path}"
    return domain, path


def _check_name(text: str, domain: str, path: str) -> None:
    if not _DOMAIN.fullmatch(domain):
        raise InvalidArgumentError(f"image reference {text!r}: {domain!r} is not a registry host")
    for component in path.split("/"):
        if not _COMPONENT.fullmatch(component):
            hint = " (names are lower case)" if _COMPONENT.fullmatch(component.lower()) else ""
            raise InvalidArgumentError(f"image reference {text!r}: {component!r} is not a valid name{hint}")
    if len(domain) + 1 + len(path) > _MAX_NAME_LENGTH:
        raise InvalidArgumentError(
            f"image reference {text[:60]!r}…: the name is longer than {_MAX_NAME_LENGTH} characters"
        )
    if _HEX_ID.fullmatch(path.removeprefix("library/")):
        raise InvalidArgumentError(f"image reference {text!r} is an image id, not a name that can be pulled")
