"""Commands on images."""

from __future__ import annotations

import argparse
from pathlib import Path

from cli.client import Client
from cli.connect import connect
from cli.pods import verbose_json
from cli.text import short, size, table
from host.errors import InvalidArgumentError, NotFoundError
from proto.podkeel.v1 import agent_pb2
from proto.runtime.v1 import cri_pb2


def list_images(options: argparse.Namespace) -> None:
    """``podkeel images`` and ``podkeel image ls``."""
    with connect(options) as client:
        answer = client.call(cri_pb2.ListImagesRequest(), cri_pb2.ListImagesResponse, "list images")
    images = sorted(answer.images, key=lambda image: (list(image.repo_tags), image.id))
    if options.quiet:
        print(*(image.id for image in images), sep="\n", end="\n" if images else "")
        return
    rows = [
        (name, short(image.id), size(image.size), "pinned" if image.pinned else "")
        for image in images
        for name in (list(image.repo_tags) or list(image.repo_digests) or ["-"])
    ]
    print(table(("IMAGE", "ID", "SIZE", ""), rows))


def find_image(client: Client, reference: str) -> cri_pb2.Image | None:
    """The image on the node that ``reference`` names, if there is one."""
    request = cri_pb2.ImageStatusRequest(image=cri_pb2.ImageSpec(image=reference))
    answer = client.call(request, cri_pb2.ImageStatusResponse, f"look for image {reference}")
    return answer.image if answer.HasField("image") else None


def credentials(options: argparse.Namespace) -> cri_pb2.AuthConfig | None:
    """The credentials in ``--creds``; None without that option. Raises InvalidArgumentError for another form."""
    if options.creds is None:
        return None
    user, colon, password = options.creds.partition(":")
    if not colon:
        raise InvalidArgumentError("--creds takes USER:PASSWORD")
    return cri_pb2.AuthConfig(username=user, password=password)


def pull_image(
    client: Client,
    reference: str,
    *,
    auth: cri_pb2.AuthConfig | None = None,
    sandbox_config: cri_pb2.PodSandboxConfig | None = None,
) -> str:
    """Pull an image, without a deadline; returns the reference that the agent gives it."""
    spec = cri_pb2.ImageSpec(image=reference, user_specified_image=reference)
    request = cri_pb2.PullImageRequest(image=spec, auth=auth, sandbox_config=sandbox_config)
    return client.call(request, cri_pb2.PullImageResponse, f"pull {reference}", timeout=None).image_ref


def import_archive(options: argparse.Namespace) -> None:
    """``podkeel image import``."""
    with connect(options) as client:
        for image in import_image(client, options.path, options.reference):
            print(f"{', '.join(image.references) or 'no name'}  {short(image.id)}")


def import_image(client: Client, path: str | Path, reference: str = "") -> list[agent_pb2.ImportedImage]:
    """Import the archive or folder at ``path`` on the node; ``reference`` names images without a name."""
    request = agent_pb2.ImportImageRequest(path=str(Path(path).absolute()), reference=reference)
    answer = client.call(request, agent_pb2.ImportImageResponse, f"import {path}", timeout=None)
    return list(answer.images)


def remove(options: argparse.Namespace) -> None:
    """``podkeel image rm``."""
    with connect(options) as client:
        for reference in options.references:
            if find_image(client, reference) is None:
                raise NotFoundError(f"image {reference} is not on this node")
            request = cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image=reference))
            client.call(request, cri_pb2.RemoveImageResponse, f"remove image {reference}")
            print(f"{reference} removed")


def inspect(options: argparse.Namespace) -> None:
    """``podkeel image inspect``."""
    request = cri_pb2.ImageStatusRequest(image=cri_pb2.ImageSpec(image=options.reference), verbose=True)
    with connect(options) as client:
        answer = client.call(request, cri_pb2.ImageStatusResponse, f"inspect image {options.reference}")
    if not answer.HasField("image"):
        raise NotFoundError(f"image {options.reference} is not on this node")
    print(verbose_json(answer))
