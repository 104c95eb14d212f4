"""``podkeel image prune``: removes images that no container uses."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from cli.client import Client
from cli.connect import connect
from cli.text import number, short, size
from host.errors import PodkeelError
from proto.podkeel.v1 import agent_pb2
from proto.runtime.v1 import cri_pb2


def prune(options: argparse.Namespace) -> int:
    """Remove unused images and print what that freed; 1 if an image could not be removed."""
    status = 0
    with connect(options) as client:
        unused = list(_unused(client, with_tags=options.all))
        if options.dry_run:
            for image in unused:
                print(f"{_name(image)}  {short(image.id)}")
            print(f"{number(len(unused), 'image')} would be removed")
            return 0
        before, removed = _used(client), 0
        for image in unused:
            request = cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image=image.id))
            try:
                client.call(request, cri_pb2.RemoveImageResponse, f"remove image {_name(image)}")
            except PodkeelError as error:
                print(error)
                status = 1
            else:
                removed += 1
                print(f"{_name(image)}  {short(image.id)} removed")
        print(f"{number(removed, 'image')} removed, {size(max(0, before - _used(client)))} freed")
    return status


def _unused(client: Client, *, with_tags: bool) -> Iterator[cri_pb2.Image]:
    """The images without containers that are not pinned. ``with_tags``: also those that have a tag."""
    usage = client.call(agent_pb2.DiskUsageRequest(), agent_pb2.DiskUsageResponse, "ask which images are used")
    used = {item.id for item in usage.images if item.containers}
    images = client.call(cri_pb2.ListImagesRequest(), cri_pb2.ListImagesResponse, "list images").images
    for image in sorted(images, key=lambda image: (list(image.repo_tags), image.id)):
        if image.id not in used and not image.pinned and (with_tags or not image.repo_tags):
            yield image


def _used(client: Client) -> int:
    usage = client.call(agent_pb2.DiskUsageRequest(), agent_pb2.DiskUsageResponse, "ask for disk usage")
    return usage.layer_bytes + usage.blob_bytes


def _name(image: cri_pb2.Image) -> str:
    return next(iter([*image.repo_tags, *image.repo_digests]), "-")
