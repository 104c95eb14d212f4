"""Whether an image may be used: the node's policy against the signatures of the image."""

from __future__ import annotations

import datetime
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

from host.concurrency.threads import in_image_thread
from host.errors import InvalidArgumentError, KubeletReasonError, NotFoundError
from images.oci.reference import Reference
from images.options import ImageOptions
from images.signatures import claims, gpg, lookaside, sigstore
from images.signatures.attachment import Attachment
from images.signatures.places import Places, places_for
from images.signatures.policy import Rule
from images.signatures.refusal import SignatureRefusedError
from images.signatures.requirements import (
    AcceptAnything,
    Reject,
    Requirement,
    SignedBy,
    describe,
)

T = TypeVar("T")
# The sigstore signatures that are attached to a digest.
Attached: TypeAlias = Callable[[str], AsyncGenerator[Attachment, None]]

_MAX_NAMED = 5


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one requirement: met, or why not."""

    requirement: str
    met: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Verification:
    """The policy against an image: ``policy`` is where its rule is, empty without one."""

    name: str
    digest: str
    policy: str
    verdicts: Sequence[Verdict]


class _Signatures(Generic[T]):
    """Signatures in the order in which they are fetched, each once, however many requirements look at them."""

    def __init__(self, source: AsyncGenerator[T, None]) -> None:
        self._source = source
        self._fetched: list[T] = []

    async def __aiter__(self) -> AsyncIterator[T]:
        for found in self._fetched:
            yield found
        async for found in self._source:
            self._fetched.append(found)
            yield found

    async def close(self) -> None:
        """Fetch no more."""
        await self._source.aclose()


@dataclass(frozen=True, slots=True)
class _Found:
    """The signatures of an image, each with the digest that it is attached to; fetched when a requirement looks."""

    name: Reference
    places: Places
    simple: _Signatures[tuple[str, bytes]]
    sigstore: _Signatures[tuple[str, Attachment]]
    accepts_unnamed: bool


async def verdicts(
    rule: Rule, options: ImageOptions, attached: Attached, name: Reference, digests: Sequence[str]
) -> list[Verdict]:
    """What becomes of each requirement. ``digests`` are the image's: that of its index if it has one, and its own.

    A signature of any of them counts: an index names its images by digest. Raises what asking for signatures raises,
    and KubeletReasonError ``SignatureValidationFailed`` for a policy that cannot be used.
    """
    if not rule.needs_signatures:
        return [_simple(requirement) for requirement in rule.requirements]
    places = await in_image_thread(places_for, options.registries_dir, name)
    wanted = tuple(dict.fromkeys(digests))
    simple = _Signatures(_simple_signatures(places, name, wanted))
    sigstore_signatures = _Signatures(_attachments(attached, wanted if places.attachments else ()))
    found = _Found(name, places, simple, sigstore_signatures, options.accept_unnamed_signatures)
    try:
        return [await _verdict(requirement, found) for requirement in rule.requirements]
    except (InvalidArgumentError, NotFoundError) as error:
        why = f"the signatures of image {name} ({digests[0]}) cannot be read: {error.message}"
        raise KubeletReasonError("SignatureValidationFailed", why) from error
    finally:
        await simple.close()
        await sigstore_signatures.close()


async def _simple_signatures(
    places: Places, name: Reference, digests: Sequence[str]
) -> AsyncGenerator[tuple[str, bytes], None]:
    for digest in digests:
        async with aclosing(lookaside.simple_signatures(places.lookaside, name, digest)) as signatures:
            async for signature in signatures:
                yield digest, signature


async def _attachments(attached: Attached, digests: Sequence[str]) -> AsyncGenerator[tuple[str, Attachment], None]:
    for digest in digests:
        async with aclosing(attached(digest)) as found:
            async for attachment in found:
                yield digest, attachment


async def require(
    rule: Rule, options: ImageOptions, attached: Attached, name: Reference, digests: Sequence[str]
) -> None:
    """Raise KubeletReasonError ``SignatureValidationFailed`` unless the image meets each requirement of the rule."""
    for verdict in await verdicts(rule, options, attached, name, digests):
        if not verdict.met:
            raise KubeletReasonError(
                "SignatureValidationFailed",
                f"image {name} ({digests[0]}): {rule.title}: {verdict.requirement}: {verdict.reason}",
            )


def _simple(requirement: Requirement) -> Verdict:
    if isinstance(requirement, AcceptAnything):
        return Verdict(describe(requirement), True, "any image is accepted")
    return Verdict(describe(requirement), False, "the policy accepts no such image")


async def _verdict(requirement: Requirement, found: _Found) -> Verdict:
    if isinstance(requirement, (AcceptAnything, Reject)):
        return _simple(requirement)
    if isinstance(requirement, SignedBy):
        return await _signed_by(requirement, found)
    refusals: list[str] = []
    trust = await in_image_thread(sigstore.trust_of, requirement, found.accepts_unnamed)
    async for digest, attachment in found.sigstore:
        try:
            signer = await in_image_thread(sigstore.accept, trust, found.name, digest, attachment, _now())
            return Verdict(describe(requirement), True, signer)
        except SignatureRefusedError as error:
            refusals.append(str(error))
    off = "in its registry (use-sigstore-attachments is false in registries.d)"
    where = "in its registry" if found.places.attachments else off
    return Verdict(describe(requirement), False, _summary(refusals, where))


async def _signed_by(requirement: SignedBy, found: _Found) -> Verdict:
    refusals: list[str] = []
    rings = await in_image_thread(gpg.keyrings, requirement)
    async for digest, signature in found.simple:
        try:
            signer = await _accept_simple(requirement, rings, found.name, digest, signature)
            return Verdict(describe(requirement), True, signer)
        except SignatureRefusedError as error:
            refusals.append(str(error))
    return Verdict(describe(requirement), False, _summary(refusals, f"at {found.places.lookaside}"))


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


async def _accept_simple(
    requirement: SignedBy, rings: Sequence[bytes], name: Reference, digest: str, signature: bytes
) -> str:
    document = await gpg.signed_document(signature, rings)
    claim = claims.read(document, claims.GPG_TYPE)
    claims.check(requirement.signed_identity, name, digest, claim)
    return f"signed as {claim.reference}"


def _summary(refusals: Sequence[str], where: str) -> str:
    if not refusals:
        return f"a signature is required, and there is none {where}"
    if len(refusals) == 1:
        return f"its signature is not accepted: {refusals[0]}"
    told = "; ".join(f"{number}: {reason}" for number, reason in enumerate(refusals[:_MAX_NAMED], 1))
    return f"none of its {len(refusals)} signatures is accepted: {told}"
