"""The calls on images of Podkeel's own service (proto/podkeel/v1/agent.proto)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from cri.services.image_service import credentials_of
from host.errors import InvalidArgumentError
from images.content.progress import LayerState, PullProgress
from images.images import Images
from images.oci.reference import parse
from proto.podkeel.v1 import agent_pb2

_PROGRESS_SECONDS = 0.2
_STATES = {
    LayerState.WAITING: agent_pb2.LayerProgress.WAITING,
    LayerState.RUNNING: agent_pb2.LayerProgress.RUNNING,
    LayerState.DONE: agent_pb2.LayerProgress.DONE,
}


class ImageCalls:
    """Image calls that the CRI does not have: archives, and what a pull would do."""

    def __init__(self, images: Images) -> None:
        self._images = images

    async def import_image(self, request: agent_pb2.ImportImageRequest) -> agent_pb2.ImportImageResponse:
        """Import an archive of the node."""
        images = await self._images.puller.import_archive(_node_path(request.path), request.reference)
        return agent_pb2.ImportImageResponse(
            images=[agent_pb2.ImportedImage(id=image.id, references=image.repo_tags) for image in images]
        )

    async def pull(self, request: agent_pb2.PullRequest) -> AsyncIterator[agent_pb2.PullProgress]:
        """Pull an image; the pull ends when its last caller leaves."""
        credentials = credentials_of(request.auth) if request.HasField("auth") else None
        reference = str(parse(request.reference))
        told = agent_pb2.PullProgress()
        seen: PullProgress | None = None
        pulling = asyncio.create_task(self._images.puller.pull(request.reference, credentials))
        try:
            while not (await asyncio.wait((pulling,), timeout=_PROGRESS_SECONDS))[0]:
                now = next((pull for pull in self._images.puller.pulls() if pull.reference == reference), None)
                seen = now or seen
                if now is not None and (message := _progress(now)) != told:
                    told = message
                    yield told
            image = pulling.result()
        finally:
            pulling.cancel()
            await asyncio.wait((pulling,))
        last = agent_pb2.PullProgress(reference=reference, started=told.started, image_id=image.id)
        for layer in seen.layers if seen is not None else ():
            last.layers.add(
                digest=layer.digest,
                state=agent_pb2.LayerProgress.DONE,
                size=layer.size,
                received=layer.size,
                reused=layer.reused,
            )
        yield last

    async def list_pulls(self, _request: agent_pb2.ListPullsRequest) -> agent_pb2.ListPullsResponse:
        """The pulls that run now."""
        return agent_pb2.ListPullsResponse(pulls=[_progress(pull) for pull in self._images.puller.pulls()])

    async def export_images(self, request: agent_pb2.ExportImagesRequest) -> agent_pb2.ExportImagesResponse:
        """Write images to an OCI archive on the node."""
        if not request.references:
            raise InvalidArgumentError("no image is named: give references")
        size = await self._images.exporter.export(request.references, _node_path(request.path))
        return agent_pb2.ExportImagesResponse(bytes=size)

    async def push_image(self, request: agent_pb2.PushImageRequest) -> agent_pb2.PushImageResponse:
        """Push an image to a registry."""
        credentials = credentials_of(request.auth) if request.HasField("auth") else None
        pushed = await self._images.exporter.push(request.reference, request.destination, credentials)
        return agent_pb2.PushImageResponse(
            reference=pushed.reference,
            digest=pushed.digest,
            sent=pushed.sent,
            mounted=pushed.mounted,
            present=pushed.present,
        )

    async def tag_image(self, request: agent_pb2.TagImageRequest) -> agent_pb2.TagImageResponse:
        """Give an image one more name."""
        return agent_pb2.TagImageResponse(name=await self._images.store.tag(request.reference, request.name))

    async def check_images(self, request: agent_pb2.CheckImagesRequest) -> agent_pb2.CheckImagesResponse:
        """Compare every image with its digests; if requested, remove broken ones."""
        report = await self._images.checker.check(repair=request.repair)
        answer = agent_pb2.CheckImagesResponse(images=report.images, layers=report.layers)
        for finding in report.findings:
            answer.findings.add(
                images=finding.images, digest=finding.digest, problem=finding.problem, repair=finding.repair
            )
        return answer

    async def disk_usage(self, _request: agent_pb2.DiskUsageRequest) -> agent_pb2.DiskUsageResponse:
        """The size of images on disk."""
        usage = await self._images.disk_usage()
        answer = agent_pb2.DiskUsageResponse(
            layer_bytes=usage.layers, blob_bytes=usage.blobs, container_bytes=usage.containers
        )
        for item in usage.images:
            answer.images.add(
                id=item.image.id,
                references=item.image.repo_tags or item.image.repo_digests,
                bytes=item.used_bytes,
                unique_bytes=item.unique_bytes,
                containers=item.containers,
            )
        return answer

    async def explain_image(self, request: agent_pb2.ExplainImageRequest) -> agent_pb2.ExplainImageResponse:
        """Ask every host that a pull would try."""
        credentials = credentials_of(request.auth) if request.HasField("auth") else None
        plan = await self._images.puller.explain(request.reference, credentials)
        return agent_pb2.ExplainImageResponse(
            reference=str(plan.name),
            policy=plan.policy,
            hosts=[
                agent_pb2.HostAnswer(
                    address=host.address,
                    configured_in=host.configured_in,
                    mirror=host.mirror,
                    credentials=host.credentials,
                    answered=host.answered,
                    answer=host.answer,
                )
                for host in plan.hosts
            ],
        )

    async def verify_image(self, request: agent_pb2.VerifyImageRequest) -> agent_pb2.VerifyImageResponse:
        """Compare the signatures of an image with the node's policy."""
        credentials = credentials_of(request.auth) if request.HasField("auth") else None
        found = await self._images.puller.verify(request.reference, credentials)
        return agent_pb2.VerifyImageResponse(
            reference=found.name,
            digest=found.digest,
            policy=found.policy,
            requirements=[
                agent_pb2.SignatureRequirement(requirement=verdict.requirement, met=verdict.met, reason=verdict.reason)
                for verdict in found.verdicts
            ],
        )


def _progress(pull: PullProgress) -> agent_pb2.PullProgress:
    message = agent_pb2.PullProgress(reference=pull.reference, started=pull.started)
    for layer in pull.layers:
        message.layers.add(
            digest=layer.digest,
            state=_STATES[layer.state],
            size=layer.size,
            received=layer.received,
            reused=layer.reused,
        )
    return message


def _node_path(text: str) -> Path:
    path = Path(text)
    if not path.is_absolute():
        raise InvalidArgumentError(f"image archive {text!r}: give an absolute path on the node")
    return path
