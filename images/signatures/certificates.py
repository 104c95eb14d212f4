"""Certificates that sign images: whether an authority of the policy issued one, and to whom.

Document: Fulcio's docs/oid-info.md for the extension with the issuer of the identity.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import ExtendedKeyUsageOID, ObjectIdentifier

from images.signatures.keys import PublicKey, read_file, unusable
from images.signatures.refusal import SignatureRefusedError
from images.signatures.requirements import Fulcio, Pki

_ISSUER = ObjectIdentifier("1.3.6.1.4.1.57264.1.1")
_ISSUER_2 = ObjectIdentifier("1.3.6.1.4.1.57264.1.8")
_UTF8 = 0x0C
_LONG_FORM = 0x80
_DEEPEST = 5
_MAX_CERTIFICATES = 20


def accepted_by_fulcio(authority: Fulcio, leaf: bytes, chain: bytes, when: datetime.datetime) -> PublicKey:
    """The key of a certificate that Fulcio issued to the policy's identity, valid at ``when``; PEM. Blocks.

    Raises SignatureRefusedError, and KubeletReasonError for a policy that cannot be used.
    """
    roots = _policy_certificates(authority.ca_path, authority.ca_data)
    certificate = _single(leaf)
    _check_chain(certificate, _untrusted(chain), roots, when)
    issuer = _oidc_issuer(certificate)
    if issuer != authority.oidc_issuer:
        raise SignatureRefusedError(f"its certificate was issued for {issuer[:200]!a}, not {authority.oidc_issuer!r}")
    emails = _names(certificate, x509.RFC822Name)
    if authority.subject_email not in emails:
        raise SignatureRefusedError(f"its certificate is one of {_told(emails)}, not of {authority.subject_email!r}")
    return _key(certificate)


def accepted_by_pki(authority: Pki, leaf: bytes, chain: bytes, when: datetime.datetime) -> PublicKey:
    """The same for a certificate of an authority of one's own."""
    roots = _policy_certificates(authority.ca_roots_path, authority.ca_roots_data)
    between = _untrusted(chain)
    if authority.ca_intermediates_path or authority.ca_intermediates_data:
        between = _policy_certificates(authority.ca_intermediates_path, authority.ca_intermediates_data)
    certificate = _single(leaf)
    _check_chain(certificate, between, roots, when)
    emails, hosts = _names(certificate, x509.RFC822Name), _names(certificate, x509.DNSName)
    if authority.subject_email and authority.subject_email not in emails:
        raise SignatureRefusedError(f"its certificate is one of {_told(emails)}, not of {authority.subject_email!r}")
    if authority.subject_hostname and authority.subject_hostname not in hosts:
        raise SignatureRefusedError(f"its certificate is one of {_told(hosts)}, not of {authority.subject_hostname!r}")
    return _key(certificate)


def _policy_certificates(path: str, data: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(read_file(path) if path else data)
    except ValueError as error:
        raise unusable(f"{path or 'its data'} holds no certificates: {error}") from error


def _single(pem: bytes) -> x509.Certificate:
    found = _loaded(pem, "certificate")
    if len(found) != 1:
        raise SignatureRefusedError(f"it has {len(found)} certificates instead of one")
    return found[0]


def _untrusted(pem: bytes) -> list[x509.Certificate]:
    return _loaded(pem, "certificate chain") if pem.strip() else []


def _loaded(pem: bytes, what: str) -> list[x509.Certificate]:
    try:
        found = x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise SignatureRefusedError(f"its {what} cannot be read") from error
    if len(found) > _MAX_CERTIFICATES:
        raise SignatureRefusedError(f"its {what} has more than {_MAX_CERTIFICATES} certificates")
    return found


def _check_chain(
    leaf: x509.Certificate,
    between: Sequence[x509.Certificate],
    roots: Sequence[x509.Certificate],
    when: datetime.datetime,
) -> None:
    """Raise SignatureRefusedError unless ``leaf`` may sign code and comes from one of ``roots`` (RFC 5280, 6.1)."""
    if not leaf.not_valid_before_utc <= when <= leaf.not_valid_after_utc:
        raise SignatureRefusedError(
            f"its certificate is valid from {leaf.not_valid_before_utc} to {leaf.not_valid_after_utc}, "
            f"and it was made at {when}"
        )
    try:
        usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        signs_code = ExtendedKeyUsageOID.CODE_SIGNING in usage
    except x509.ExtensionNotFound:
        signs_code = False
    except ValueError as error:
        raise SignatureRefusedError("its certificate has extensions that cannot be read") from error
    if not signs_code:
        raise SignatureRefusedError("its certificate is not one for signing code")
    if not _leads_to(leaf, between, roots, when, 0):
        raise SignatureRefusedError("no authority of the policy issued its certificate")


def _leads_to(
    certificate: x509.Certificate,
    between: Sequence[x509.Certificate],
    roots: Sequence[x509.Certificate],
    when: datetime.datetime,
    depth: int,
) -> bool:
    if any(_issued(root, certificate, when, depth) for root in roots):
        return True
    if depth >= _DEEPEST:
        return False
    issuers = [found for found in between if found != certificate and _issued(found, certificate, when, depth)]
    return any(_leads_to(found, between, roots, when, depth + 1) for found in issuers[:_DEEPEST])


def _issued(issuer: x509.Certificate, certificate: x509.Certificate, when: datetime.datetime, depth: int) -> bool:
    """Whether ``issuer`` is an authority that is valid at ``when`` and has ``depth`` authorities below it at most."""
    if issuer.subject != certificate.issuer:
        return False
    if not issuer.not_valid_before_utc <= when <= issuer.not_valid_after_utc:
        return False
    try:
        constraints = issuer.extensions.get_extension_for_class(x509.BasicConstraints).value
        if not constraints.ca or (constraints.path_length is not None and constraints.path_length < depth):
            return False
        if not _may_sign_certificates(issuer):
            return False
        certificate.verify_directly_issued_by(issuer)
    except (x509.ExtensionNotFound, ValueError, TypeError, InvalidSignature):
        return False
    return True


def _may_sign_certificates(issuer: x509.Certificate) -> bool:
    try:
        return issuer.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    except x509.ExtensionNotFound:
        return True


def _oidc_issuer(certificate: x509.Certificate) -> str:
    """The service that identified the certificate's owner. The newer extension is a DER string."""
    found = set()
    for extension in certificate.extensions:
        if extension.oid in (_ISSUER, _ISSUER_2) and isinstance(extension.value, x509.UnrecognizedExtension):
            value = extension.value.value
            found.add(_der_text(value) if extension.oid == _ISSUER_2 else value.decode(errors="replace"))
    if len(found) != 1:
        raise SignatureRefusedError("its certificate names no single issuer of identities: Fulcio did not issue it")
    return found.pop()


def _der_text(value: bytes) -> str:
    if len(value) < 2 or value[0] != _UTF8:
        raise SignatureRefusedError("its certificate has an issuer of identities that cannot be read")
    begin, size = 2, value[1]
    if size >= _LONG_FORM:
        octets = size - _LONG_FORM
        begin, size = 2 + octets, int.from_bytes(value[2 : 2 + octets])
    if begin + size != len(value):
        raise SignatureRefusedError("its certificate has an issuer of identities that cannot be read")
    return value[begin:].decode(errors="replace")


def _names(certificate: x509.Certificate, kind: type[x509.RFC822Name | x509.DNSName]) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return list(names.get_values_for_type(kind))


def _told(names: Sequence[str]) -> str:
    return ", ".join(f"{name[:100]!a}" for name in names[:3]) or "nobody with such a name"


def _key(certificate: x509.Certificate) -> PublicKey:
    key = certificate.public_key()
    if not isinstance(key, PublicKey):
        raise SignatureRefusedError("its certificate has a key of a kind that is not supported")
    return key
