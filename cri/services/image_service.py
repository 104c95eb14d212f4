"""The CRI's ImageService: each call makes one call to images/."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Iterator

import msgspec

from host import untrusted_json
from host.concurrency.threads import in_stats_thread
from host.errors import InvalidArgumentError, NotFoundError
from images.image import Image, numeric_user
from images.registry.credentials import Credentials
from images.usage import FilesystemUsage
from proto.runtime.v1 import cri_pb2
from proto.wire import encode_item, in_messages
from runtime.agent import Agent

_log = logging.getLogger("podkeel.images")


class ImageService:
    """Images of the node. Errors are mapped by ``cri.methods``."""

    def __init__(self, agent: Agent) -> None:
        self._images = agent.images.store
        self._snapshots = agent.images.snapshots
        self._puller = agent.images.puller
        self._encoded: dict[str, bytes] = {}
        self._encoded_revision = -1

    def _matching(self, wanted: cri_pb2.ImageFilter) -> Iterator[bytes]:
        if self._encoded_revision != self._images.revision:
            self._encoded = {image.id: _item(image) for image in self._images.images()}
            self._encoded_revision = self._images.revision
        if not wanted.image.image:
            yield from self._encoded.values()
            return
        image = self._images.find(wanted.image.image)
        if image is not None:
            yield self._encoded[image.id]

    async def list_images(self, request: cri_pb2.ListImagesRequest) -> bytes:
        """Images that match a filter."""
        return b"".join(self._matching(request.filter))

    async def stream_images(self, request: cri_pb2.StreamImagesRequest) -> AsyncIterator[bytes]:
        """The same in several messages."""
        for message in in_messages(self._matching(request.filter)):
            yield message

    async def image_status(self, request: cri_pb2.ImageStatusRequest) -> cri_pb2.ImageStatusResponse:
        """One image; an absent one is an empty answer."""
        _require_name(request.image)
        image = self._images.find(request.image.image)
        if image is None:
            return cri_pb2.ImageStatusResponse()
        response = cri_pb2.ImageStatusResponse(image=to_message(image))
        if request.verbose:
            try:
                config = await self._images.config_file(image)
            except NotFoundError:
                return cri_pb2.ImageStatusResponse()
            response.info["info"] = await in_stats_thread(_information, image, config)
        return response

    async def pull_image(self, request: cri_pb2.PullImageRequest) -> cri_pb2.PullImageResponse:
        """Pull an image; answers its id."""
        _require_name(request.image)
        credentials = credentials_of(request.auth) if request.HasField("auth") else None
        image = await self._puller.pull(request.image.image, credentials)
        return cri_pb2.PullImageResponse(image_ref=image.id)

    async def remove_image(self, request: cri_pb2.RemoveImageRequest) -> cri_pb2.RemoveImageResponse:
        """Remove an image with all its tags; idempotent."""
        _require_name(request.image)
        await self._images.remove(request.image.image)
        return cri_pb2.RemoveImageResponse()

    async def image_fs_info(self, _request: cri_pb2.ImageFsInfoRequest) -> cri_pb2.ImageFsInfoResponse:
        """The size of images and containers on disk, from recorded sizes and project quotas."""
        containers = await in_stats_thread(self._snapshots.filesystem_usage)  # quotas may have to be read from the disk
        return cri_pb2.ImageFsInfoResponse(
            image_filesystems=[_usage(self._images.filesystem_usage())],
            container_filesystems=[_usage(containers)],
        )


def to_message(image: Image) -> cri_pb2.Image:
    """The CRI's Image. If the image names no user, neither uid nor username is set; clients read that as root."""
    message = cri_pb2.Image(
        id=image.id,
        repo_tags=image.repo_tags,
        repo_digests=image.repo_digests,
        size=image.size,
        spec=cri_pb2.ImageSpec(image=image.id),
        pinned=image.pinned,
    )
    user = image.config.user.partition(":")[0]
    number = numeric_user(user)
    if number is None:
        message.username = user
    else:
        message.uid.value = number
    return message


def _item(image: Image) -> bytes:
    """The image as an encoded item of a list; b"", which leaves it out, if no CRI message can represent it."""
    try:
        return encode_item(to_message(image))
    except (ValueError, TypeError) as error:
        _log.error("image %s: left out of lists: it cannot be encoded as a CRI message: %s", image.id, error)
        return b""


def _information(image: Image, config: bytes) -> str:
    information = {"chainIDs": image.chain_ids, "imageSpec": msgspec.Raw(untrusted_json.valid_text(config))}
    return msgspec.json.encode(information).decode()


def _require_name(image: cri_pb2.ImageSpec) -> None:
    if not image.image:
        raise InvalidArgumentError("no image is named: give image.image")


def credentials_of(auth: cri_pb2.AuthConfig) -> Credentials:
    """The images room's form of an AuthConfig."""
    return Credentials(
        username=auth.username,
        password=auth.password,
        auth=auth.auth,
        identity_token=auth.identity_token,
        registry_token=auth.registry_token,
        server_address=auth.server_address,
    )


def _usage(usage: FilesystemUsage) -> cri_pb2.FilesystemUsage:
    return cri_pb2.FilesystemUsage(
        timestamp=time.time_ns(),
        fs_id=cri_pb2.FilesystemIdentifier(mountpoint=usage.mountpoint),
        used_bytes=cri_pb2.UInt64Value(value=usage.used_bytes),
        inodes_used=cri_pb2.UInt64Value(value=usage.inodes_used),
    )
