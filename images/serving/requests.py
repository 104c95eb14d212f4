"""What a client of the distribution API asks for: its path, its rights, and the part of a blob that it wants."""

from __future__ import annotations

import base64
import binascii
import hmac
import re
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import h11

from host.errors import InvalidArgumentError
from images.oci.reference import parse

_PATH = re.compile(r"/v2/(?P<name>[a-z0-9][a-z0-9._/-]{0,254})/(?P<kind>manifests|blobs)/(?P<reference>[\w.:-]{1,256})")
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


class Wanted(NamedTuple):
    """A manifest or blob (``kind``) of a repository, whose name begins with its registry."""

    kind: str
    repository: str
    reference: str


def wanted(target: str) -> Wanted | None:
    """What the request's target names; None for a target of another form.

    ``?ns=`` is the registry that the client would ask without a mirror, as containerd sends it. Without it, the path
    begins with the registry, or the registry is Docker Hub.
    """
    try:
        url = urlsplit(target)
        match = _PATH.fullmatch(unquote(url.path, errors="strict"))
        if match is None:
            return None
        namespace = parse_qs(url.query, max_num_fields=16).get("ns", [""])[0]
        name = f"{namespace}/{match['name']}" if namespace else match["name"]
        return Wanted(match["kind"], parse(name).repository, match["reference"])
    except (ValueError, InvalidArgumentError):
        return None


def has_token(request: h11.Request, tokens: Sequence[bytes]) -> bool:
    """Whether the request has one of ``tokens``: as ``Authorization: Bearer``, or as the password of ``Basic``."""
    for name, value in request.headers:
        if name == b"authorization":
            scheme, _, given = value.partition(b" ")
            token = given.strip()
            if scheme.lower() == b"basic":
                try:
                    token = base64.b64decode(token, validate=True).partition(b":")[2]
                except binascii.Error:
                    return False
            known = [hmac.compare_digest(token, one) for one in tokens]  # all, so that the time depends on none of them
            return scheme.lower() in (b"basic", b"bearer") and any(known)
    return False


def span_of(request: h11.Request, size: int) -> tuple[int, int] | None:
    """The first byte and the byte after the last one that the request wants of ``size`` bytes.

    The whole if there is no ``Range`` of one part. None if the part is outside.
    """
    header = next((value.decode("latin-1") for name, value in request.headers if name == b"range"), "")
    match = _RANGE.fullmatch(header.replace(" ", ""))
    if match is None or not (match[1] or match[2]):
        return 0, size
    if not match[1]:
        return (max(0, size - int(match[2])), size) if int(match[2]) else None
    begin, end = int(match[1]), min(size, int(match[2]) + 1) if match[2] else size
    return (begin, end) if begin < end else None
