"""The calls on images of Podkeel's own service (proto/podkeel/v1/agent.proto)."""

from __future__ import annotations

from pathlib import Path

from cri.image_service import credentials_of
from host.errors import InvalidArgumentError
from images.store import ImageStore
from proto.podkeel.v1 import agent_pb2


class ImageCalls:
    """What the CRI has no call for: archives, and what a pull would do."""

    def __init__(self, images: ImageStore) -> None:
        self._images = images

    async def import_image(self, request: agent_pb2.ImportImageRequest) -> agent_pb2.ImportImageResponse:
        """Import an archive that lies on the node."""
        images = await self._images.import_archive(_node_path(request.path), request.reference)
        return agent_pb2.ImportImageResponse(
            images=[agent_pb2.ImportedImage(id=image.id, references=image.repo_tags) for image in images]
        )

    async def explain_image(self, request: agent_pb2.ExplainImageRequest) -> agent_pb2.ExplainImageResponse:
        """Ask every host that a pull would try."""
        credentials = credentials_of(request.auth) if request.HasField("auth") else None
        name, answers = await self._images.explain(request.reference, credentials)
        return agent_pb2.ExplainImageResponse(
            reference=str(name),
            hosts=[
                agent_pb2.HostAnswer(
                    address=host.address,
                    configured_in=host.configured_in,
                    mirror=host.mirror,
                    credentials=host.credentials,
                    answered=host.answered,
                    answer=host.answer,
                )
                for host in answers
            ],
        )


def _node_path(text: str) -> Path:
    path = Path(text)
    if not path.is_absolute():
        raise InvalidArgumentError(f"image archive {text!r}: give an absolute path on the node")
    return path
