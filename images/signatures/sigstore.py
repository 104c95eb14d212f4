"""Whether a sigstore signature meets a requirement: key, identity, and entry of a transparency log."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from cryptography.hazmat.primitives import serialization

from images.oci.reference import Reference
from images.signatures import bundles, certificates, claims, rekor
from images.signatures.attachment import Attachment
from images.signatures.keys import PublicKey, contents, from_base64, load, verifies
from images.signatures.refusal import SignatureRefusedError
from images.signatures.requirements import SigstoreSigned, describe


@dataclass(frozen=True, slots=True)
class Trust:
    """A requirement with its keys: those of signers, each with its name, and those of transparency logs.

    ``accepts_unnamed`` says that a bundle may name no image, and so none of the requirement's identity.
    """

    requirement: SigstoreSigned
    keys: tuple[tuple[str, PublicKey], ...]
    logs: tuple[PublicKey, ...]
    accepts_unnamed: bool


@dataclass(frozen=True, slots=True)
class _Signature:
    """One signature in either form; ``envelope`` is the statement in a signed envelope, None without one."""

    signature: bytes
    signed: bytes
    envelope: bytes | None
    certificate: bytes
    chain: bytes
    entries: tuple[rekor.LogEntry, ...]


def trust_of(requirement: SigstoreSigned, accepts_unnamed: bool) -> Trust:
    """Read the keys of a requirement. Raises KubeletReasonError if one cannot be used. Blocks."""
    named = contents(requirement.key_path, requirement.key_paths, requirement.key_data, requirement.key_datas)
    keys = tuple((name, load(name, pem)) for name, pem in named)
    return Trust(requirement, keys, tuple(rekor.log_keys(requirement)), accepts_unnamed)


def accept(trust: Trust, name: Reference, digest: str, attachment: Attachment, now: datetime.datetime) -> str:
    """Who signed the image ``name`` with ``digest``. Raises SignatureRefusedError if the requirement is not met."""
    found = _read(attachment)
    signer, key = _signer(trust, found, now)
    if not verifies(key, found.signature, found.signed):
        raise SignatureRefusedError(f"it was not made with {signer}, or its document was changed")
    identity = trust.requirement.signed_identity
    if found.envelope is None:
        claim = claims.read(found.signed, claims.COSIGN_TYPE)
        claims.check(identity, name, digest, claim)
        return f"signed as {claim.reference} with {signer}"
    signed = bundles.signed_name(found.envelope, digest)
    if signed or not trust.accepts_unnamed:
        claims.check_name(identity, name, signed)
    return f"signed{' as ' if signed else ''}{signed} with {signer}"


def _read(attachment: Attachment) -> _Signature:
    if attachment.is_bundle:
        bundle = bundles.read(attachment.payload)
        parts = (bundle.signature, bundle.signed, bundle.statement, bundle.certificate, bundle.chain, bundle.entries)
        return _Signature(*parts)
    if not attachment.signature:
        raise SignatureRefusedError("it has no signature (dev.cosignproject.cosign/signature)")
    return _Signature(
        signature=from_base64(attachment.signature, "signature"),
        signed=attachment.payload,
        envelope=None,
        certificate=attachment.certificate.encode(),
        chain=attachment.chain.encode(),
        entries=(rekor.read(attachment.log_entry),) if attachment.log_entry else (),
    )


def _signer(trust: Trust, found: _Signature, now: datetime.datetime) -> tuple[str, PublicKey]:
    """The key that must have made the signature, with its name."""
    requirement = trust.requirement
    if requirement.fulcio is None and requirement.pki is None:
        name, key = next(
            ((name, key) for name, key in trust.keys if verifies(key, found.signature, found.signed)), trust.keys[0]
        )
        if requirement.logged:
            _logged(trust, found, _pem(key))
        return name, key
    if not found.certificate:
        raise SignatureRefusedError("it has no certificate")
    when = _logged(trust, found, found.certificate) if requirement.logged else now
    if requirement.fulcio is not None:
        key = certificates.accepted_by_fulcio(requirement.fulcio, found.certificate, found.chain, when)
    elif requirement.pki is not None:
        key = certificates.accepted_by_pki(requirement.pki, found.certificate, found.chain, when)
    return describe(requirement).removeprefix("sigstoreSigned "), key


def _logged(trust: Trust, found: _Signature, signer: bytes) -> datetime.datetime:
    if not found.entries:
        raise SignatureRefusedError("it has no entry of a transparency log")
    about = rekor.Signature(signer, found.signature, found.signed, found.envelope)
    refusals = []
    for entry in found.entries:
        try:
            return rekor.logged_at(entry, trust.logs, about)
        except SignatureRefusedError as error:
            refusals.append(error)
    raise refusals[0]


def _pem(key: PublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
