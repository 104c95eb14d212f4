"""``podkeel image export``, ``push`` and ``tag``."""

from __future__ import annotations

import argparse
from pathlib import Path

from cli.connect import connect
from cli.images.images import credentials
from cli.text import size
from proto.podkeel.v1 import agent_pb2


def export(options: argparse.Namespace) -> None:
    """Write images to an OCI archive on the node."""
    path = Path(options.path).absolute()
    request = agent_pb2.ExportImagesRequest(path=str(path), references=options.references)
    with connect(options) as client:
        answer = client.call(request, agent_pb2.ExportImagesResponse, f"export to {path}", timeout=None)
    print(f"{path}  {size(answer.bytes)}")


def push(options: argparse.Namespace) -> None:
    """Push an image; prints the name and digest it has in its registry."""
    request = agent_pb2.PushImageRequest(
        reference=options.reference, destination=options.destination or "", auth=credentials(options)
    )
    with connect(options) as client:
        answer = client.call(request, agent_pb2.PushImageResponse, f"push {options.reference}", timeout=None)
    blobs = f"{answer.sent} blobs sent, {answer.mounted} mounted, {answer.present} there already"
    print(f"{answer.reference}@{answer.digest}  {blobs}")


def tag(options: argparse.Namespace) -> None:
    """Give an image one more name; prints it in full."""
    request = agent_pb2.TagImageRequest(reference=options.reference, name=options.name)
    with connect(options) as client:
        print(client.call(request, agent_pb2.TagImageResponse, f"tag {options.reference}").name)
