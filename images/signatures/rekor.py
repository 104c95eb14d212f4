"""A transparency log's promise that it holds a signature, checked without asking the log.

Document: cosign's SIGNATURE_SPEC.md ("bundle"); Rekor's hashedrekord 0.0.1 and dsse 0.0.1.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from host import untrusted_json
from host.untrusted_json import JsonError
from images.signatures.keys import PublicKey, contents, from_base64, load, unusable, verifies
from images.signatures.refusal import SignatureRefusedError
from images.signatures.requirements import SigstoreSigned

T = TypeVar("T")

_LATEST = 1 << 40  # seconds since the epoch
_SHA256 = "sha256"


class _Payload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    body: str
    integrated_time: int = msgspec.field(name="integratedTime")
    log_index: int = msgspec.field(name="logIndex")
    log_id: str = msgspec.field(name="logID")


class LogEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What cosign keeps of an entry: the entry itself, and the log's signature of it."""

    SignedEntryTimestamp: str
    Payload: _Payload


class _Hash(msgspec.Struct, frozen=True):
    algorithm: str
    value: str


class _Data(msgspec.Struct, frozen=True):
    hash: _Hash


class _Content(msgspec.Struct, frozen=True):
    content: str


class _LoggedSignature(msgspec.Struct, frozen=True):
    content: str
    public_key: _Content = msgspec.field(name="publicKey")


class _SignatureRecord(msgspec.Struct, frozen=True):
    signature: _LoggedSignature
    data: _Data


class _EnvelopeSignature(msgspec.Struct, frozen=True):
    signature: str
    verifier: str


class _EnvelopeRecord(msgspec.Struct, frozen=True, rename="camel"):
    payload_hash: _Hash
    signatures: tuple[_EnvelopeSignature, ...]


class _Body(msgspec.Struct, frozen=True, rename="camel"):
    api_version: str
    kind: str
    spec: dict[str, Any]


def log_keys(requirement: SigstoreSigned) -> list[PublicKey]:
    """The public keys of the logs that the policy accepts. Blocks."""
    found = contents(
        requirement.rekor_public_key_path,
        requirement.rekor_public_key_paths,
        requirement.rekor_public_key_data,
        requirement.rekor_public_key_datas,
    )
    keys = [load(name, pem) for name, pem in found]
    if not all(isinstance(key, ec.EllipticCurvePublicKey) for key in keys):
        raise unusable("a public key of Rekor is not one of ECDSA")
    return keys


def read(text: str) -> LogEntry:
    """The entry that is attached to a signature. Raises SignatureRefusedError."""
    try:
        return untrusted_json.decode(text.encode(), LogEntry)
    except JsonError as error:
        raise SignatureRefusedError(f"its entry of the transparency log cannot be read: {error}") from error


def entry(body: str, promise: str, when: int, index: int, log_id: str) -> LogEntry:
    """An entry from the parts that a sigstore bundle has."""
    return LogEntry(promise, _Payload(body, when, index, log_id))


class Signature(msgspec.Struct, frozen=True):
    """What an entry must be about.

    ``signer`` is the public key or the certificate in PEM, ``signed`` what the signature is of. ``envelope`` is the
    content of a signed envelope (DSSE), None where there is none.
    """

    signer: bytes
    content: bytes
    signed: bytes
    envelope: bytes | None


def logged_at(found: LogEntry, keys: Sequence[PublicKey], about: Signature) -> datetime.datetime:
    """When the log took the entry. Raises SignatureRefusedError if no log promised it, or it is another's."""
    payload = found.Payload
    parts = {"body": payload.body, "integratedTime": payload.integrated_time}
    parts |= {"logID": payload.log_id, "logIndex": payload.log_index}
    # Written so it is canonical JSON (RFC 8785): sorted members, plain strings, whole numbers.
    if not (payload.body.isascii() and payload.log_id.isalnum()) or '"' in payload.body or "\\" in payload.body:
        raise SignatureRefusedError("its entry of the transparency log is broken")
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()
    promise = from_base64(found.SignedEntryTimestamp, "SignedEntryTimestamp")
    if not any(verifies(key, promise, canonical) for key in keys):
        raise SignatureRefusedError("no transparency log of the policy signed its entry")
    body = _decoded(from_base64(payload.body, "entry of the transparency log"), _Body)
    if body.api_version != "0.0.1":
        raise SignatureRefusedError(f"its entry of the transparency log has the version {body.api_version[:20]!a}")
    if body.kind == "hashedrekord" and about.envelope is None:
        _check_signature(_converted(body.spec, _SignatureRecord), about)
    elif body.kind == "dsse" and about.envelope is not None:
        _check_envelope(_converted(body.spec, _EnvelopeRecord), about, about.envelope)
    else:
        raise SignatureRefusedError(f"its entry of the transparency log is a {body.kind[:50]!a}")
    if not 0 < payload.integrated_time < _LATEST:
        raise SignatureRefusedError("its entry of the transparency log has no time")
    return datetime.datetime.fromtimestamp(payload.integrated_time, datetime.UTC)


def _check_signature(record: _SignatureRecord, about: Signature) -> None:
    digest = record.data.hash
    same = (
        digest.algorithm == _SHA256
        and digest.value.lower() == hashlib.sha256(about.signed).hexdigest()
        and from_base64(record.signature.content, "logged signature") == about.content
        and _der(from_base64(record.signature.public_key.content, "logged key")) == _der(about.signer)
    )
    if not same:
        raise SignatureRefusedError("its entry of the transparency log is one of another signature")


def _check_envelope(record: _EnvelopeRecord, about: Signature, content: bytes) -> None:
    digest = record.payload_hash
    same = digest.algorithm == _SHA256 and digest.value.lower() == hashlib.sha256(content).hexdigest()
    logged = [
        found
        for found in record.signatures
        if from_base64(found.signature, "logged signature") == about.content
        and _der(from_base64(found.verifier, "logged key")) == _der(about.signer)
    ]
    if not same or not logged:
        raise SignatureRefusedError("its entry of the transparency log is one of another signature")


def _der(pem: bytes) -> bytes:
    """A public key or a certificate as DER, from PEM. Raises SignatureRefusedError."""
    try:
        if b"CERTIFICATE" in pem:
            return x509.load_pem_x509_certificate(pem).public_bytes(serialization.Encoding.DER)
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SignatureRefusedError("a key in its entry of the transparency log cannot be read") from error
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _decoded(content: bytes, kind: type[_Body]) -> _Body:
    try:
        return untrusted_json.decode(content, kind)
    except JsonError as error:
        raise SignatureRefusedError(f"its entry of the transparency log cannot be read: {error}") from error


def _converted(spec: dict[str, Any], kind: type[T]) -> T:
    try:
        return msgspec.convert(spec, kind)
    except msgspec.ValidationError as error:
        raise SignatureRefusedError(f"its entry of the transparency log cannot be read: {error}") from error
