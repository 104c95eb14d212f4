"""Brings images to the node: pulls from registries, imports from archives."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from host.concurrency.tasks import SingleFlight
from host.concurrency.threads import in_image_thread, in_long_thread
from host.errors import InvalidArgumentError, KubeletReasonError, LimitError, NodeLimitError
from host.stages import Operation
from images.archives.reader import ImageArchive
from images.content.layer_source import LayerSource, RelatedBlobs
from images.content.progress import PullProgress, RunningPull
from images.content.source import Candidate
from images.image import Image, check_linux
from images.layers.layer import Layer
from images.layers.store import LayerStore
from images.oci.reference import Reference, parse
from images.options import ImageOptions
from images.registry.credentials import Credentials
from images.signatures.policy import rule_for
from images.store import ImageStore

if TYPE_CHECKING:
    from images.registry.client import HostAnswer
    from images.signatures.verification import Verification

_log = logging.getLogger("podkeel.images")


@dataclass(frozen=True, slots=True)
class PullPlan:
    """What a pull does: the full name, the rule of the policy (empty without a policy), the answer of each host."""

    name: Reference
    policy: str
    hosts: list[HostAnswer]


class ImagePuller:
    """Brings images into ``store``.

    ``fetched_bytes`` counts the bytes received from registries since the start, ``reused_bytes`` those that partial
    pulls took from kept layers instead.
    """

    def __init__(self, store: ImageStore, options: ImageOptions, data_dir: Path, layers: LayerStore) -> None:
        self._store = store
        self._options = options
        self._data_dir = data_dir
        self._layers = layers
        self._pulls: SingleFlight[tuple[str, Credentials | None], Image] = SingleFlight(
            "the pull was ended: the agent is stopping"
        )
        self._running_pulls: list[RunningPull] = []
        self.fetched_bytes = 0
        self.reused_bytes = 0

    async def close(self) -> None:
        """Cancel running pulls with their clean-up."""
        await self._pulls.close()

    async def pull(self, reference: str, credentials: Credentials | None = None) -> Image:
        """Pull the image and return it once it is complete. Identical pulls at the same time are one pull.

        A tag that another image had moves to this one. Raises InvalidArgumentError for a malformed reference or a
        broken image, NotFoundError, PermissionDeniedError, LimitError, UnsupportedError for an artifact, and
        KubeletReasonError ``RegistryUnavailable``. After an error only partial blobs stay; the next pull of the image
        continues from them.
        """
        name = parse(reference)
        begin = time.perf_counter()
        image = await self._pulls.run((str(name), credentials), lambda: self._pull(name, credentials))
        fields = {"image": str(name), "image_id": image.id, "seconds": round(time.perf_counter() - begin, 6)}
        _log.info("image %s: pulled: %s", name, image.id, extra={"fields": fields})
        return image

    async def _pull(self, name: Reference, credentials: Credentials | None) -> Image:
        # The HTTP client takes 20 MiB and 0.2 seconds to import: only an agent that pulls loads it.
        pulling = await in_image_thread(importlib.import_module, f"{__package__}.registry.resolve")
        operation = Operation("PullImage")
        known = self._store.named(name)
        known_digests = known.repo_digests if known is not None else ()
        running = RunningPull(str(name))
        self._running_pulls.append(running)
        try:
            async with pulling.fetch(self._options, name, credentials, known_digests, operation) as found:
                if found is not None:
                    candidate = replace(found, related=self._related(name))
                    running.sources = candidate.layer_sources()
                    try:
                        return await self._install(candidate, running.sources, operation)
                    finally:
                        self.fetched_bytes += candidate.transferred()
                        self.reused_bytes += sum(source.tally.reused for source in running.sources)
        finally:
            self._running_pulls.remove(running)
        if known is not None and (present := self._store.find(known.id)) is not None:
            return present
        return await self._pull(name, credentials)  # the image was removed while the registry answered

    def _related(self, name: Reference) -> RelatedBlobs:
        """The kept blobs of images of the same registry.

        Not of others: a registry sees which ranges it is not asked for, and so which files the node has.
        """
        near: dict[str, None] = {}
        far: dict[str, None] = {}
        for image in reversed(self._store.images()):
            names = [*image.repo_tags, *image.repo_digests]
            if not any(text.startswith(f"{name.domain}/") for text in names):
                continue
            same = any(text.startswith((f"{name.repository}:", f"{name.repository}@")) for text in names)
            found = near if same else far
            for number in image.layers:
                layer = self._layers.get(number)
                if layer is not None and layer.blob_digest:
                    found[layer.blob_digest] = None
        return RelatedBlobs(tuple(near), tuple(digest for digest in far if digest not in near))

    def pulls(self) -> list[PullProgress]:
        """The progress of each running pull, oldest first."""
        return [
            PullProgress(pull.reference, pull.started, tuple(map(self._layers.progress, pull.sources)))
            for pull in self._running_pulls
        ]

    async def explain(self, reference: str, credentials: Credentials | None = None) -> PullPlan:
        """What a pull would ask, and which policy about signatures holds; nothing is pulled."""
        name = parse(reference)
        try:
            rule = await in_image_thread(rule_for, self._options, name)
            policy = rule.describe() if rule is not None else ""
        except KubeletReasonError as error:
            policy = error.message
        registry = await in_image_thread(importlib.import_module, f"{__package__}.registry.client")
        async with registry.RegistryClient(self._options, name, credentials) as client:
            return PullPlan(name, policy, await client.explain())

    async def verify(self, reference: str, credentials: Credentials | None = None) -> Verification:
        """Whether the policy about signatures accepts what ``reference`` names in its registry; nothing is pulled.

        Raises what a pull raises, except for signatures that are not accepted.
        """
        resolving = await in_image_thread(importlib.import_module, f"{__package__}.registry.resolve")
        verified: Verification = await resolving.verify_signatures(self._options, parse(reference), credentials)
        return verified

    async def import_archive(self, path: Path, reference: str = "") -> list[Image]:
        """Import the images of an OCI layout folder, an OCI archive or a docker archive, also a gzipped one.

        An image without a name gets ``reference``, or none if that is empty. Raises NotFoundError if the file does not
        exist, InvalidArgumentError if it is broken, LimitError, UnsupportedError.
        """
        operation = Operation("ImportImage")
        archive = ImageArchive(path, self._data_dir, self._options.max_archive_bytes)
        try:
            async with operation.stage("manifest"):
                await in_long_thread(archive.open)
                candidates = await in_long_thread(archive.candidates, reference)
            return [await self._install(candidate, candidate.layer_sources(), operation) for candidate in candidates]
        finally:
            archive.close()

    async def _install(self, candidate: Candidate, sources: Sequence[LayerSource], operation: Operation) -> Image:
        """Unpack the missing layers of the image, then publish it."""
        try:
            return await self._install_layers(candidate, sources, operation)
        except NodeLimitError:
            raise  # the fetched bytes are valid
        except (InvalidArgumentError, LimitError) as error:
            await self._layers.drop_fetched([layer.digest for layer in candidate.layers], error)
            raise

    async def _install_layers(
        self, candidate: Candidate, sources: Sequence[LayerSource], operation: Operation
    ) -> Image:
        check_linux(candidate.config, candidate.subject)
        layers: list[Layer] = []
        try:
            async with operation.stage("layers"):
                layers = await self._layers.obtain_all(sources, candidate.subject)
            async with operation.stage("commit"):
                return await self._store.commit(candidate, tuple(layers))
        finally:
            await self._layers.release([layer.number for layer in layers])
