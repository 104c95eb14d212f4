"""What a policy requires of an image: the entries of a policy file.

Document: containers-policy.json(5).
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from images.oci.reference import Reference, parse


class MatchExact(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="matchExact"):
    """The signature names exactly the image that is pulled, with its tag or digest."""


class MatchRepoDigestOrExact(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="matchRepoDigestOrExact"):
    """The signature names the tag that is pulled; for a pull by digest, any tag of the same repository."""


class MatchRepository(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="matchRepository"):
    """The signature names the repository that is pulled from, with any tag or none."""


class ExactReference(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel", tag="exactReference"):
    """The signature names exactly this image."""

    docker_reference: str


class ExactRepository(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel", tag="exactRepository"):
    """The signature names this repository, with any tag or none."""

    docker_repository: str


class RemapIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel", tag="remapIdentity"):
    """As MatchRepoDigestOrExact, after ``prefix`` of the pulled name is replaced by ``signed_prefix``."""

    prefix: str
    signed_prefix: str


Identity: TypeAlias = (
    MatchExact | MatchRepoDigestOrExact | MatchRepository | ExactReference | ExactRepository | RemapIdentity
)


class AcceptAnything(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="insecureAcceptAnything"):
    """Any image is accepted."""


class Reject(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="reject"):
    """No image is accepted."""


class SignedBy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel", tag="signedBy"):
    """A "simple signing" signature by a GPG key. Exactly one of the three places of keys is given."""

    key_type: Literal["GPGKeys"]
    key_path: str = ""
    key_paths: tuple[str, ...] = ()
    key_data: bytes = b""
    signed_identity: Identity = MatchRepoDigestOrExact()

    def __post_init__(self) -> None:
        if sum(map(bool, (self.key_path, self.key_paths, self.key_data))) != 1:
            raise ValueError("give exactly one of keyPath, keyPaths and keyData")


class Fulcio(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """The authority that issues certificates for the key of one signature, and whose certificate is accepted."""

    oidc_issuer: str = msgspec.field(name="oidcIssuer")
    subject_email: str
    ca_path: str = msgspec.field(name="caPath", default="")
    ca_data: bytes = msgspec.field(name="caData", default=b"")

    def __post_init__(self) -> None:
        if bool(self.ca_path) == bool(self.ca_data):
            raise ValueError("fulcio: give exactly one of caPath and caData")
        if not self.oidc_issuer or not self.subject_email:
            raise ValueError("fulcio: oidcIssuer and subjectEmail must not be empty")


class Pki(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """Another authority that issues certificates for signing, and whose certificate is accepted."""

    ca_roots_path: str = msgspec.field(name="caRootsPath", default="")
    ca_roots_data: bytes = msgspec.field(name="caRootsData", default=b"")
    ca_intermediates_path: str = msgspec.field(name="caIntermediatesPath", default="")
    ca_intermediates_data: bytes = msgspec.field(name="caIntermediatesData", default=b"")
    subject_email: str = ""
    subject_hostname: str = ""

    def __post_init__(self) -> None:
        if bool(self.ca_roots_path) == bool(self.ca_roots_data):
            raise ValueError("pki: give exactly one of caRootsPath and caRootsData")
        if self.ca_intermediates_path and self.ca_intermediates_data:
            raise ValueError("pki: give one of caIntermediatesPath and caIntermediatesData")
        if not self.subject_email and not self.subject_hostname:
            raise ValueError("pki: give subjectEmail or subjectHostname")


class SigstoreSigned(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel", tag="sigstoreSigned"):
    """A sigstore signature, as cosign and podman make them. Exactly one kind of keys is given."""

    key_path: str = ""
    key_paths: tuple[str, ...] = ()
    key_data: bytes = b""
    key_datas: tuple[bytes, ...] = ()
    fulcio: Fulcio | None = None
    pki: Pki | None = None
    rekor_public_key_path: str = ""
    rekor_public_key_paths: tuple[str, ...] = ()
    rekor_public_key_data: bytes = b""
    rekor_public_key_datas: tuple[bytes, ...] = ()
    signed_identity: Identity = MatchRepoDigestOrExact()

    def __post_init__(self) -> None:
        keys = (self.key_path, self.key_paths, self.key_data, self.key_datas, self.fulcio, self.pki)
        if sum(map(bool, keys)) != 1:
            raise ValueError("give exactly one of keyPath, keyPaths, keyData, keyDatas, fulcio and pki")
        logs = sum(
            map(
                bool,
                (
                    self.rekor_public_key_path,
                    self.rekor_public_key_paths,
                    self.rekor_public_key_data,
                    self.rekor_public_key_datas,
                ),
            )
        )
        if logs > 1:
            raise ValueError("give one of rekorPublicKeyPath, rekorPublicKeyPaths, rekorPublicKeyData and …Datas")
        if self.fulcio is not None and not logs:
            raise ValueError("fulcio needs a public key of Rekor (rekorPublicKeyPath)")

    @property
    def logged(self) -> bool:
        """Whether the signature must be in a transparency log."""
        return bool(
            self.rekor_public_key_path
            or self.rekor_public_key_paths
            or self.rekor_public_key_data
            or self.rekor_public_key_datas
        )


Requirement: TypeAlias = AcceptAnything | Reject | SignedBy | SigstoreSigned


def describe(requirement: Requirement) -> str:
    """A requirement in a few words, with its keys, for messages."""
    match requirement:
        case AcceptAnything():
            return "insecureAcceptAnything"
        case Reject():
            return "reject"
        case SignedBy():
            paths = requirement.key_paths or (requirement.key_path or "keyData",)
            return f"signedBy {', '.join(paths)}"
        case SigstoreSigned():
            return f"sigstoreSigned {_authority(requirement)}"


def _authority(requirement: SigstoreSigned) -> str:
    if requirement.fulcio is not None:
        return f"fulcio {requirement.fulcio.subject_email} of {requirement.fulcio.oidc_issuer}"
    if requirement.pki is not None:
        return f"pki {requirement.pki.subject_email or requirement.pki.subject_hostname}"
    if requirement.key_path or requirement.key_paths:
        return ", ".join(requirement.key_paths or (requirement.key_path,))
    return "keyData" if requirement.key_data else "keyDatas"


def matches(identity: Identity, pulled: Reference, signed: str) -> bool:
    """Whether a signature that names the image ``signed`` is one for ``pulled``.

    Raises InvalidArgumentError if ``signed``, or a name of the policy, is no reference.
    """
    match identity:
        case MatchExact():
            return not _name_only(signed) and parse(signed) == pulled
        case MatchRepoDigestOrExact():
            return _repository_or_exact(pulled, signed)
        case MatchRepository():
            return parse(signed).repository == pulled.repository
        case ExactReference():
            return not _name_only(signed) and parse(signed) == parse(identity.docker_reference)
        case ExactRepository():
            return parse(signed).repository == parse(identity.docker_repository).repository
        case RemapIdentity():
            return _repository_or_exact(_remapped(identity, pulled), signed)


def _repository_or_exact(pulled: Reference, signed: str) -> bool:
    if _name_only(signed):
        return False
    if pulled.digest:
        return parse(signed).repository == pulled.repository
    return parse(signed) == pulled


def _remapped(identity: RemapIdentity, pulled: Reference) -> Reference:
    name = pulled.repository
    if name != identity.prefix and not name.startswith(f"{identity.prefix}/"):
        return pulled
    renamed = parse(identity.signed_prefix + name[len(identity.prefix) :])
    return Reference(renamed.domain, renamed.path, pulled.tag, pulled.digest)


def _name_only(text: str) -> bool:
    last = text.rpartition("/")[2]
    return ":" not in last and "@" not in last
