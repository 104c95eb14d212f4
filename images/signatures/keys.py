"""Public keys in files, and whether a signature was made with one of them."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

from host import untrusted_json
from host.errors import KubeletReasonError
from host.untrusted_json import JsonError
from images.signatures.refusal import SignatureRefusedError

PublicKey: TypeAlias = ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey

_MIN_RSA_BITS = 2048


def read_file(path: str) -> bytes:
    """A file that the policy names. Raises KubeletReasonError if it cannot be read. Blocks."""
    try:
        return untrusted_json.read_file(Path(path))
    except (OSError, JsonError) as error:
        raise unusable(f"{path} cannot be read: {error}") from error


def contents(path: str, paths: Sequence[str], data: bytes, datas: Sequence[bytes] = ()) -> list[tuple[str, bytes]]:
    """The files and texts in which a policy gives keys, each with its name for messages. Blocks."""
    files = [*([path] if path else []), *paths]
    texts = [*([data] if data else []), *datas]
    return [*((name, read_file(name)) for name in files), *(("the policy's key data", text) for text in texts)]


def load(name: str, pem: bytes) -> PublicKey:
    """A public key in PEM. Raises KubeletReasonError for anything else: the policy is wrong then."""
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise unusable(f"{name} holds no public key: {error}") from error
    if not isinstance(key, PublicKey):
        raise unusable(f"{name}: keys of this kind ({type(key).__name__}) are not supported: use ECDSA, RSA or Ed25519")
    if isinstance(key, rsa.RSAPublicKey) and key.key_size < _MIN_RSA_BITS:
        raise unusable(f"{name}: an RSA key of {key.key_size} bits is too short: use {_MIN_RSA_BITS} or more")
    return key


def unusable(why: str) -> KubeletReasonError:
    """The error for a policy whose keys cannot be used."""
    return KubeletReasonError("SignatureValidationFailed", f"the policy cannot be used: {why}")


def verifies(key: PublicKey, signature: bytes, content: bytes) -> bool:
    """Whether ``signature`` is one of ``content`` by ``key``; ECDSA and RSA with SHA-256, as cosign makes them."""
    try:
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, content)
        elif isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, content, ec.ECDSA(hashes.SHA256()))
        else:
            return _verifies_rsa(key, signature, content)
    except InvalidSignature:
        return False
    return True


def _verifies_rsa(key: rsa.RSAPublicKey, signature: bytes, content: bytes) -> bool:
    sha256 = hashes.SHA256()
    for form in (padding.PKCS1v15(), padding.PSS(padding.MGF1(sha256), padding.PSS.AUTO)):
        try:
            key.verify(signature, content, form, sha256)
        except InvalidSignature:
            continue
        return True
    return False


def from_base64(text: str, what: str) -> bytes:
    """Raises SignatureRefusedError for anything but base64."""
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise SignatureRefusedError(f"its {what} is not base64") from error


def same_key(one: PublicKey, other: PublicKey) -> bool:
    """Whether two public keys are the same."""
    return _der(one) == _der(other)


def _der(key: PublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
