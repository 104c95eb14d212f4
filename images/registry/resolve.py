"""Resolves a reference at its registry and fetches manifest and config. The first pull imports this module."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import ModuleType
from typing import TYPE_CHECKING, cast

from host.concurrency.threads import in_image_thread
from host.errors import InvalidArgumentError, KubeletReasonError, NotFoundError, PermissionDeniedError
from host.stages import Operation
from images.content.manifest_search import Document, FoundImage, Search, Wanted, advance, find_image
from images.content.slots import Origin
from images.content.source import Candidate
from images.oci.manifests import Descriptor
from images.oci.platforms import this_machine
from images.oci.reference import Reference
from images.options import ImageOptions
from images.registry.attachments import attachments
from images.registry.client import FetchedManifest, RegistryClient
from images.registry.credentials import Credentials
from images.signatures.policy import Rule, rule_for
from images.signatures.verifiers import verify

if TYPE_CHECKING:
    from images.signatures.verification import Verification

_LARGE = 32 << 10  # bytes; larger documents are decoded in a thread


@asynccontextmanager
async def fetch(
    options: ImageOptions,
    name: Reference,
    credentials: Credentials | None,
    known_digests: Sequence[str],
    operation: Operation,
) -> AsyncIterator[Candidate | None]:
    """Resolve ``name`` and provide the image to install; None if it still names one of ``known_digests``.

    The layers can be read until the block ends. Raises the errors of ``ImagePuller.pull``.
    """
    async with RegistryClient(options, name, credentials) as client:
        async with operation.stage("resolve"):
            rule = await in_image_thread(rule_for, options, name)
            signed = rule is not None and rule.needs_signatures
            head = await _unchanged(client, name, known_digests) if known_digests and not signed else None
            top = head or await client.manifest()
        async with operation.stage("verify"):
            await verify(options, name, Descriptor(top.media_type, top.digest, top.size))
            if rule is not None and not signed:
                await _require(rule, options, client, name, (top.digest,))
        if top is head:
            yield None
            return
        async with operation.stage("manifest"):
            candidate = await _candidate(client, name, top)
        if rule is not None and signed:
            async with operation.stage("verify"):
                await _require(rule, options, client, name, (top.digest, candidate.manifest_digest))
        yield candidate


async def verify_signatures(options: ImageOptions, name: Reference, credentials: Credentials | None) -> Verification:
    """What the policy says about what ``name`` names now. Raises what fetching a manifest raises."""
    verification = await _verification()
    async with RegistryClient(options, name, credentials) as client:
        top = await client.manifest()
        rule = await in_image_thread(rule_for, options, name)
        if rule is None:
            return cast("Verification", verification.Verification(str(name), top.digest, "", ()))
        candidate = await _candidate(client, name, top)
        digests = (top.digest, candidate.manifest_digest)
        found = await verification.verdicts(rule, options, functools.partial(attachments, client), name, digests)
        return cast("Verification", verification.Verification(str(name), top.digest, rule.title, tuple(found)))


async def _verification() -> ModuleType:
    """It loads a library of cryptography, which an agent without such a policy never needs."""
    return await in_image_thread(_load_verification)


def _load_verification() -> ModuleType:
    from images.signatures import verification

    return verification


async def _require(
    rule: Rule, options: ImageOptions, client: RegistryClient, name: Reference, digests: Sequence[str]
) -> None:
    if not rule.accepts_anything:
        verification = await _verification()
        await verification.require(rule, options, functools.partial(attachments, client), name, digests)


async def _unchanged(client: RegistryClient, name: Reference, known_digests: Sequence[str]) -> FetchedManifest | None:
    try:
        head = await client.head()
    except (KubeletReasonError, NotFoundError, PermissionDeniedError):
        return None  # some registries do not support HEAD, or refuse it; if GET fails too, its error is raised
    return head if f"{name.repository}@{head.digest}" in known_digests else None


async def _candidate(client: RegistryClient, name: Reference, top: FetchedManifest) -> Candidate:
    subject = f"image {name}"
    search = find_image(Document(top.content, top.media_type), top.digest, this_machine(), subject)
    found = await _advance(search, None, len(top.content))
    while isinstance(found, Wanted):
        document = await _document(client, found, subject)
        found = await _advance(search, document, len(document.content))
    digest_name = f"{name.repository}@{top.digest}"
    return Candidate(
        subject=subject,
        manifest=found.content,
        manifest_digest=found.digest,
        config=found.config,
        layers=tuple(found.manifest.layers),
        names=(digest_name,) if name.digest else (name.tagged, digest_name),
        open_layer=functools.partial(RegistryClient.blob, client),
        transferred=lambda: client.transferred,
        resumable=True,
        origin=Origin(name.domain),
        open_range=functools.partial(RegistryClient.blob, client),
    )


async def _advance(search: Search, document: Document | None, size: int) -> Wanted | FoundImage:
    if size <= _LARGE:
        return advance(search, document)
    return await in_image_thread(advance, search, document)


async def _document(client: RegistryClient, wanted: Wanted, subject: str) -> Document:
    descriptor = wanted.descriptor
    if not wanted.is_manifest:
        return Document(await client.small_blob(descriptor, wanted.limit))
    fetched = await client.manifest(descriptor.digest)
    if len(fetched.content) != descriptor.size:
        raise InvalidArgumentError(
            f"{subject} is broken: manifest {descriptor.digest} has {len(fetched.content)} bytes, "
            f"expected {descriptor.size}"
        )
    return Document(fetched.content, fetched.media_type)
