"""Fetching the sigstore signatures of an image from its registry.

Documents: cosign's SIGNATURE_SPEC.md; OCI distribution specification, "Listing Referrers".
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

import msgspec

from host import untrusted_json
from host.concurrency.threads import in_image_thread
from host.errors import InvalidArgumentError, NotFoundError
from host.untrusted_json import JsonError
from images.oci.manifests import Descriptor
from images.registry.client import RegistryClient
from images.signatures import bundles
from images.signatures.attachment import Attachment
from images.signatures.claims import MAX_CLAIM_BYTES

T = TypeVar("T")

MAX_SIGNATURES = 32  # signatures of one image

_PAYLOAD_TYPE = "application/vnd.dev.cosign.simplesigning.v1+json"
_SIGNATURE_ARTIFACT = "application/vnd.dev.cosign.artifact.sig.v1+json"
_PREFIX = "dev.sigstore.cosign/"
_SECONDS = 60.0


class _Layer(Descriptor, frozen=True, rename="camel"):
    annotations: dict[str, str] | None = None


class _Manifest(msgspec.Struct, frozen=True):
    layers: tuple[_Layer, ...] | None = None


class _Index(msgspec.Struct, frozen=True):
    manifests: tuple[_Referrer, ...] | None = None


class _Referrer(Descriptor, frozen=True, rename="camel"):
    artifact_type: str = ""


async def attachments(client: RegistryClient, digest: str) -> AsyncGenerator[Attachment, None]:
    """The sigstore signatures of the manifest ``digest`` that its repository has, MAX_SIGNATURES at most."""
    count = 0
    async with aclosing(_layers(client, digest)) as layers:
        async for layer in layers:
            count += 1
            if count > MAX_SIGNATURES:
                return
            yield await _attachment(client, layer)


async def _attachment(client: RegistryClient, layer: _Layer) -> Attachment:
    annotations = layer.annotations or {}
    return Attachment(
        await client.small_blob(layer, MAX_CLAIM_BYTES),
        is_bundle=layer.media_type in bundles.MEDIA_TYPES,
        signature=annotations.get("dev.cosignproject.cosign/signature", ""),
        certificate=annotations.get(f"{_PREFIX}certificate", ""),
        chain=annotations.get(f"{_PREFIX}chain", ""),
        log_entry=annotations.get(f"{_PREFIX}bundle", ""),
    )


async def _layers(client: RegistryClient, digest: str) -> AsyncGenerator[_Layer, None]:
    async with aclosing(_manifests(client, digest)) as manifests:
        async for manifest in manifests:
            for layer in manifest.layers or ():
                if layer.media_type == _PAYLOAD_TYPE or layer.media_type in bundles.MEDIA_TYPES:
                    yield layer


async def _manifests(client: RegistryClient, digest: str) -> AsyncGenerator[_Manifest, None]:
    try:
        tagged = await client.tagged(f"{digest.replace(':', '-')}.sig")
        yield await _decoded(tagged.content, _Manifest, f"the signatures of {digest}")
    except NotFoundError:
        pass
    for kind in (_SIGNATURE_ARTIFACT, *bundles.MEDIA_TYPES):
        for referrer in (await _referrers(client, digest, kind))[:MAX_SIGNATURES]:
            fetched = await client.manifest(referrer.digest)
            yield await _decoded(fetched.content, _Manifest, f"{referrer.digest}, which refers to {digest},")


async def _referrers(client: RegistryClient, digest: str, kind: str) -> list[_Referrer]:
    """What refers to the manifest; registries without such lists have them under a tag."""
    try:
        content = await client.referrers(digest, kind)
    except NotFoundError:
        try:
            content = (await client.tagged(digest.replace(":", "-"))).content
        except NotFoundError:
            return []
    index = await _decoded(content, _Index, f"the list of what refers to {digest}")
    return [found for found in index.manifests or () if found.artifact_type == kind]


async def _decoded(content: bytes, kind: type[T], what: str) -> T:
    try:
        return await in_image_thread(untrusted_json.decode, content, kind, max_bytes=len(content))
    except JsonError as error:
        raise InvalidArgumentError(f"{what} cannot be read: {error}") from error
