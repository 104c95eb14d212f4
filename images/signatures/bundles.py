"""Sigstore bundles: a signed statement about an image, with what is needed to check it.

Documents: sigstore's protobuf-specs (sigstore_bundle.proto, in its JSON form), DSSE's protocol.md, in-toto's statement.
"""

from __future__ import annotations

import base64
from typing import TypeVar

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from host import untrusted_json
from host.untrusted_json import JsonError
from images.signatures import rekor
from images.signatures.keys import from_base64
from images.signatures.refusal import SignatureRefusedError

T = TypeVar("T")

MEDIA_TYPES = tuple(f"application/vnd.dev.sigstore.bundle{end}" for end in (".v0.3+json", "+json;version=0.3"))
MAX_BUNDLE_BYTES = 4 << 20

_IN_TOTO = "application/vnd.in-toto+json"
_STATEMENTS = ("https://in-toto.io/Statement/v1", "https://in-toto.io/Statement/v0.1")
_SIGN_PREDICATE = "https://sigstore.dev/cosign/sign/v1"
_MAX_ENTRIES = 8


class _Certificate(msgspec.Struct, frozen=True, rename="camel"):
    raw_bytes: str


class _Chain(msgspec.Struct, frozen=True):
    certificates: tuple[_Certificate, ...] = ()


class _LogId(msgspec.Struct, frozen=True, rename="camel"):
    key_id: str


class _Promise(msgspec.Struct, frozen=True, rename="camel"):
    signed_entry_timestamp: str = ""


class _LogEntry(msgspec.Struct, frozen=True, rename="camel"):
    log_id: _LogId
    log_index: str | int = 0
    integrated_time: str | int = 0
    inclusion_promise: _Promise | None = None
    canonicalized_body: str = ""


class _Material(msgspec.Struct, frozen=True, rename="camel"):
    certificate: _Certificate | None = None
    x509_certificate_chain: _Chain | None = None
    tlog_entries: tuple[_LogEntry, ...] = ()


class _Signature(msgspec.Struct, frozen=True):
    sig: str


class _Envelope(msgspec.Struct, frozen=True, rename="camel"):
    payload: str
    payload_type: str
    signatures: tuple[_Signature, ...]


class _File(msgspec.Struct, frozen=True, rename="camel"):
    media_type: str
    verification_material: _Material
    dsse_envelope: _Envelope | None = None


class _Subject(msgspec.Struct, frozen=True):
    digest: dict[str, str]
    name: str = ""


class _Statement(msgspec.Struct, frozen=True, rename="camel"):
    type: str = msgspec.field(name="_type")
    subject: tuple[_Subject, ...]
    predicate_type: str


class Bundle(msgspec.Struct, frozen=True):
    """A signature of ``signed``. Certificates are PEM, empty without; ``statement`` is what the envelope holds."""

    signature: bytes
    signed: bytes
    statement: bytes
    certificate: bytes
    chain: bytes
    entries: tuple[rekor.LogEntry, ...]


def read(content: bytes) -> Bundle:
    """Raises SignatureRefusedError for anything but a bundle with one signed statement."""
    found = _decoded(content, _File, "bundle")
    envelope = found.dsse_envelope
    if envelope is None:
        raise SignatureRefusedError("its bundle has no signed statement (dsseEnvelope)")
    if envelope.payload_type != _IN_TOTO or len(envelope.signatures) != 1:
        raise SignatureRefusedError("its bundle has another payload than one signed in-toto statement")
    statement = from_base64(envelope.payload, "statement")
    kind = envelope.payload_type.encode()
    material = found.verification_material
    chain = material.x509_certificate_chain
    certificates = [material.certificate] if material.certificate else list(chain.certificates if chain else ())
    pems = [_pem(certificate.raw_bytes) for certificate in certificates]
    return Bundle(
        signature=from_base64(envelope.signatures[0].sig, "signature"),
        signed=b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(statement), statement),
        statement=statement,
        certificate=pems[0] if pems else b"",
        chain=b"".join(pems[1:]),
        entries=tuple(_entry(entry) for entry in material.tlog_entries[:_MAX_ENTRIES]),
    )


def signed_name(statement: bytes, digest: str) -> str:
    """The name that a statement, whose signature was checked, gives the image with ``digest``; cosign 3 gives none.

    Raises SignatureRefusedError if it is not about that image, or says something else than that it is signed.
    """
    found = _decoded(statement, _Statement, "statement")
    if found.type not in _STATEMENTS or found.predicate_type != _SIGN_PREDICATE:
        raise SignatureRefusedError(f"its statement is a {found.predicate_type[:100]!a}, not a signature")
    algorithm, _, value = digest.partition(":")
    name = next((subject.name for subject in found.subject if subject.digest.get(algorithm) == value), None)
    if name is None:
        raise SignatureRefusedError("it is a signature of another image")
    return name


def _decoded(content: bytes, kind: type[T], what: str) -> T:
    try:
        return untrusted_json.decode(content, kind, max_bytes=MAX_BUNDLE_BYTES)
    except JsonError as error:
        raise SignatureRefusedError(f"its {what} cannot be read: {error}") from error


def _pem(text: str) -> bytes:
    try:
        certificate = x509.load_der_x509_certificate(from_base64(text, "certificate"))
    except ValueError as error:
        raise SignatureRefusedError("its certificate cannot be read") from error
    return certificate.public_bytes(serialization.Encoding.PEM)


def _entry(found: _LogEntry) -> rekor.LogEntry:
    try:
        when, index = int(found.integrated_time), int(found.log_index)
    except ValueError as error:
        raise SignatureRefusedError("its entry of the transparency log is broken") from error
    promise = found.inclusion_promise.signed_entry_timestamp if found.inclusion_promise else ""
    log_id = from_base64(found.log_id.key_id, "log id").hex()
    body = base64.b64encode(from_base64(found.canonicalized_body, "entry of the transparency log")).decode()
    return rekor.entry(body, promise, when, index, log_id)
