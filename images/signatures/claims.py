"""What a signature says: the signed document of "simple signing", which cosign uses too.

Documents: containers-signature(5), "The Cryptographic Signature"; cosign's SIGNATURE_SPEC.md.
"""

from __future__ import annotations

from typing import Any

import msgspec

from host import untrusted_json
from host.errors import InvalidArgumentError
from host.untrusted_json import JsonError
from images.oci.reference import Reference
from images.signatures.refusal import SignatureRefusedError
from images.signatures.requirements import Identity, matches

GPG_TYPE = "atomic container signature"
COSIGN_TYPE = "cosign container image signature"
MAX_CLAIM_BYTES = 4 << 20


class _Image(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    digest: str = msgspec.field(name="docker-manifest-digest")


class _Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    reference: str = msgspec.field(name="docker-reference")


class _Critical(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    image: _Image
    identity: _Identity


class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    critical: _Critical
    optional: dict[str, Any] | None = None


class Claim(msgspec.Struct, frozen=True):
    """The digest that was signed, and the name that the signer gave the image."""

    digest: str
    reference: str


def read(payload: bytes, kind: str) -> Claim:
    """The claim of a signed document of the type ``kind``. Raises SignatureRefusedError."""
    try:
        found = untrusted_json.decode(payload, _Document, max_bytes=MAX_CLAIM_BYTES)
    except JsonError as error:
        raise SignatureRefusedError(f"its signed document cannot be read: {error}") from error
    if found.critical.type != kind:
        raise SignatureRefusedError(f"its signed document has the type {found.critical.type[:100]!a}, not {kind!r}")
    return Claim(found.critical.image.digest, found.critical.identity.reference)


def check(identity: Identity, name: Reference, digest: str, claim: Claim) -> None:
    """Raise SignatureRefusedError unless a claim is about the image ``name`` with ``digest``."""
    if claim.digest != digest:
        raise SignatureRefusedError(f"it is a signature of another image, {claim.digest[:100]!a}")
    check_name(identity, name, claim.reference)


def check_name(identity: Identity, name: Reference, signed: str) -> None:
    """Raise SignatureRefusedError unless an image that was signed as ``signed`` may be pulled as ``name``."""
    if not signed:
        raise SignatureRefusedError("it names no image (images.accept_unnamed_signatures)")
    try:
        accepted = matches(identity, name, signed)
    except InvalidArgumentError as error:
        raise SignatureRefusedError(f"it names the image {signed[:200]!a}, which is no reference") from error
    if not accepted:
        kind = identity.__struct_config__.tag
        raise SignatureRefusedError(f"it was signed as {signed[:200]!a}, which is not {name} (signedIdentity {kind})")
