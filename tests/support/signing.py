"""Signs images as cosign and podman do, with keys made for a test.

Documents: cosign's SIGNATURE_SPEC.md; sigstore's protobuf-specs; Rekor's hashedrekord and dsse, 0.0.1.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.support.image_builder import OCI_INDEX, OCI_MANIFEST, descriptor, digest_of
from tests.support.scripted_registry import Answer, ScriptedRegistry

PAYLOAD_TYPE = "application/vnd.dev.cosign.simplesigning.v1+json"
BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_OIDC_ISSUER = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.1")
_HOUR = datetime.timedelta(hours=1)


def new_key() -> ec.EllipticCurvePrivateKey:
    """A key of the kind that cosign makes."""
    return ec.generate_private_key(ec.SECP256R1())


def public_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """What a policy's keyPath holds."""
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def sign(key: ec.EllipticCurvePrivateKey, content: bytes) -> bytes:
    """ECDSA with SHA-256, in DER."""
    return key.sign(content, ec.ECDSA(hashes.SHA256()))


def text(content: bytes) -> str:
    """Base64."""
    return base64.b64encode(content).decode()


def payload(digest: str, reference: str, **critical: Any) -> bytes:
    """The document that cosign signs."""
    claim = {"identity": {"docker-reference": reference}, "image": {"docker-manifest-digest": digest}}
    document = {"critical": {**claim, "type": "cosign container image signature", **critical}, "optional": None}
    return json.dumps(document).encode()


@dataclass
class Layer:
    """One signature as a layer of the manifest that holds it."""

    content: bytes
    annotations: dict[str, str]
    media_type: str = PAYLOAD_TYPE

    def descriptor(self) -> dict[str, Any]:
        """The layer's entry in the manifest."""
        return {**descriptor(self.media_type, self.content), "annotations": self.annotations}


def signed(key: ec.EllipticCurvePrivateKey, digest: str, reference: str, **annotations: str) -> Layer:
    """A signature of the image by the key."""
    content = payload(digest, reference)
    told = {f"dev.sigstore.cosign/{name}": value for name, value in annotations.items()}
    return Layer(content, {"dev.cosignproject.cosign/signature": text(sign(key, content)), **told})


def attach(registry: ScriptedRegistry, repository: str, digest: str, *layers: Layer) -> None:
    """Put signatures under cosign's tag for the image."""
    manifest = _manifest(registry, repository, layers)
    tag = f"{digest.replace(':', '-')}.sig"
    registry.offer(repository, manifest, OCI_MANIFEST, *(layer.content for layer in layers), tag=tag)


def refer(registry: ScriptedRegistry, repository: str, digest: str, layer: Layer, *, by_tag: bool = False) -> None:
    """Put a bundle where it refers to the image: in the list of referrers, or in the index under a tag."""
    manifest = _manifest(registry, repository, (layer,))
    registry.offer(repository, manifest, OCI_MANIFEST, layer.content, tag=f"bundle-{digest[7:]}")
    entry = {**descriptor(OCI_MANIFEST, manifest), "artifactType": layer.media_type}
    index = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]}).encode()
    if by_tag:
        registry.offer(repository, index, OCI_INDEX, tag=digest.replace(":", "-"))
    else:
        registry.answers[f"/v2/{repository}/referrers/{digest}"] = Answer(index, OCI_INDEX)


def _manifest(registry: ScriptedRegistry, repository: str, layers: tuple[Layer, ...]) -> bytes:
    registry.answers[f"/v2/{repository}/blobs/{digest_of(b'{}')}"] = Answer(b"{}")
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor("application/vnd.oci.image.config.v1+json", b"{}"),
        "layers": [layer.descriptor() for layer in layers],
    }
    return json.dumps(document).encode()


@dataclass
class Log:
    """A transparency log."""

    key: ec.EllipticCurvePrivateKey = field(default_factory=new_key)
    time: int = 1_790_000_000

    def entry(self, body: dict[str, Any]) -> dict[str, Any]:
        """What the log promises about an entry, in the form that cosign attaches to a signature."""
        log_id = hashlib.sha256(
            self.key.public_key().public_bytes(
                serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        ).hexdigest()
        encoded = text(json.dumps(body).encode())
        told = {"body": encoded, "integratedTime": self.time, "logIndex": 7, "logID": log_id}
        canonical = json.dumps(told, sort_keys=True, separators=(",", ":")).encode()
        return {"SignedEntryTimestamp": text(sign(self.key, canonical)), "Payload": told}

    def of_signature(self, signer: bytes, signature: bytes, content: bytes) -> dict[str, Any]:
        """The entry about a signature by the key or certificate ``signer`` (PEM)."""
        data = {"hash": {"algorithm": "sha256", "value": hashlib.sha256(content).hexdigest()}}
        spec = {"signature": {"content": text(signature), "publicKey": {"content": text(signer)}}, "data": data}
        return self.entry({"apiVersion": "0.0.1", "kind": "hashedrekord", "spec": spec})

    def of_envelope(self, signer: bytes, signature: bytes, statement: bytes) -> dict[str, Any]:
        """The entry about a signed statement."""
        digest = {"algorithm": "sha256", "value": hashlib.sha256(statement).hexdigest()}
        spec = {"payloadHash": digest, "signatures": [{"signature": text(signature), "verifier": text(signer)}]}
        return self.entry({"apiVersion": "0.0.1", "kind": "dsse", "spec": spec})


@dataclass
class Authority:
    """An authority as Fulcio is: it issues certificates that are valid for ten minutes."""

    key: ec.EllipticCurvePrivateKey = field(default_factory=new_key)

    @property
    def certificate(self) -> x509.Certificate:
        """Its own."""
        return self._issue("authority", self.key, _at(1_700_000_000), 365 * 10 * 24 * _HOUR, ca=True)

    def pem(self) -> bytes:
        """What a policy's caPath holds."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, key: ec.EllipticCurvePrivateKey, email: str, issuer: str, time: int) -> bytes:
        """A certificate (PEM) for the key, valid from ``time`` on."""
        names = x509.SubjectAlternativeName([x509.RFC822Name(email)])
        extension = x509.UnrecognizedExtension(_OIDC_ISSUER, issuer.encode())
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING])
        found = self._issue(
            "", key, _at(time), _HOUR / 6, extensions=[(names, True), (extension, False), (usage, False)]
        )
        return found.public_bytes(serialization.Encoding.PEM)

    def _issue(
        self,
        name: str,
        key: ec.EllipticCurvePrivateKey,
        begin: datetime.datetime,
        life: datetime.timedelta,
        *,
        ca: bool = False,
        extensions: list[tuple[x509.ExtensionType, bool]] | None = None,
    ) -> x509.Certificate:
        authority = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)] if name else [])
        builder = x509.CertificateBuilder(
            issuer_name=authority,
            subject_name=subject,
            public_key=key.public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=begin,
            not_valid_after=begin + life,
        ).add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        for extension, critical in extensions or ():
            builder = builder.add_extension(extension, critical)
        return builder.sign(self.key, hashes.SHA256())


def _at(time: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(time, datetime.UTC)


def bundle(key: ec.EllipticCurvePrivateKey, digest: str, name: str = "", log: Log | None = None) -> Layer:
    """What cosign 3 attaches: a signed statement."""
    kind = "application/vnd.in-toto+json"
    subject = {"digest": {"sha256": digest[7:]}, **({"name": name} if name else {})}
    statement = json.dumps(
        {
            "_type": "https://in-toto.io/Statement/v1",
            "subject": [subject],
            "predicateType": "https://sigstore.dev/cosign/sign/v1",
            "predicate": {},
        }
    ).encode()
    signature = sign(key, b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(statement), statement))
    material: dict[str, Any] = {"publicKey": {"hint": "key"}}
    if log is not None:
        entry = log.of_envelope(public_pem(key), signature, statement)
        told = entry["Payload"]
        material["tlogEntries"] = [
            {
                "logIndex": str(told["logIndex"]),
                "logId": {"keyId": text(bytes.fromhex(told["logID"]))},
                "kindVersion": {"kind": "dsse", "version": "0.0.1"},
                "integratedTime": str(told["integratedTime"]),
                "inclusionPromise": {"signedEntryTimestamp": entry["SignedEntryTimestamp"]},
                "canonicalizedBody": told["body"],
            }
        ]
    document = {
        "mediaType": BUNDLE_TYPE,
        "verificationMaterial": material,
        "dsseEnvelope": {
            "payload": text(statement),
            "payloadType": kind,
            "signatures": [{"sig": text(signature), "keyid": ""}],
        },
    }
    return Layer(json.dumps(document).encode(), {}, BUNDLE_TYPE)
