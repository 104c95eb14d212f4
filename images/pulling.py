"""Fetching what a reference names from its registry, up to the layers (imported by the first pull)."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from host.errors import InvalidArgumentError, KubeletReasonError
from host.stages import Operation
from images import digests
from images.candidate import Candidate
from images.credentials import Credentials
from images.manifests import LARGEST_CONFIG, Descriptor, check_is_image, choose, parse_manifest
from images.options import ImageOptions
from images.platforms import this_machine
from images.reference import Reference
from images.registry import FetchedManifest, RegistryClient
from images.verifiers import verify

_NESTING = 4


@asynccontextmanager
async def fetch(
    options: ImageOptions,
    name: Reference,
    credentials: Credentials | None,
    known_digests: Sequence[str],
    operation: Operation,
) -> AsyncIterator[Candidate | None]:
    """Resolve ``name`` and give what there is to install, or None if one of ``known_digests`` is what it names now.

    The layers can be read until the block ends. Errors as ``ImageStore.pull`` says.
    """
    async with RegistryClient(options, name, credentials) as client:
        async with operation.stage("resolve"):
            head = await _unchanged(client, name, known_digests) if known_digests else None
            top = head or await client.manifest()
        async with operation.stage("verify"):
            await verify(options, name, Descriptor(top.media_type, top.digest, top.size))
        if top is head:
            yield None
            return
        async with operation.stage("manifest"):
            candidate = await _candidate(client, name, top)
        yield candidate


async def _unchanged(client: RegistryClient, name: Reference, known_digests: Sequence[str]) -> FetchedManifest | None:
    try:
        head = await client.head()
    except KubeletReasonError:
        return None  # some registries know no HEAD; if it is out of reach, the GET says so
    return head if f"{name.repository}@{head.digest}" in known_digests else None


async def _candidate(client: RegistryClient, name: Reference, top: FetchedManifest) -> Candidate:
    subject = f"image {name}"
    fetched = top
    manifest = parse_manifest(fetched.content, subject, fetched.media_type)
    for _ in range(_NESTING):
        if not manifest.is_index:
            break
        chosen = choose(manifest, this_machine(), subject)
        fetched = await client.manifest(chosen.digest)
        if len(fetched.content) != chosen.size:
            size = len(fetched.content)
            raise InvalidArgumentError(
                f"{subject} is broken: manifest {chosen.digest} has {size} bytes, expected {chosen.size}"
            )
        manifest = parse_manifest(fetched.content, subject, fetched.media_type)
    else:
        raise InvalidArgumentError(f"{subject} is broken: indexes within indexes within indexes")
    config = await client.small_blob(check_is_image(manifest, subject), LARGEST_CONFIG)
    digest_name = f"{name.repository}@{top.digest}"
    return Candidate(
        subject=subject,
        manifest=fetched.content,
        manifest_digest=digests.check_digest(fetched.digest, subject),
        config=config,
        layers=tuple(manifest.layers),
        names=(digest_name,) if name.digest else (name.tagged, digest_name),
        open_layer=functools.partial(RegistryClient.blob, client),
        transferred=lambda: client.transferred,
        resumable=True,
    )
