"""``podkeel checkpoint`` and ``podkeel image from-checkpoint``."""

from __future__ import annotations

import argparse
from pathlib import Path

from cli.connect import connect
from cli.lookup import find_container
from proto.podkeel.v1 import agent_pb2
from proto.runtime.v1 import cri_pb2


def checkpoint(options: argparse.Namespace) -> None:
    """Write a running container to an archive on the node, and print its path."""
    location = str(Path(options.archive).absolute())
    with connect(options) as client:
        container = find_container(client, options.container)
        request = cri_pb2.CheckpointContainerRequest(
            container_id=container.id, location=location, timeout=options.timeout
        )
        what = f"checkpoint container {options.container!r}"
        client.call(request, cri_pb2.CheckpointContainerResponse, what, timeout=None)
    print(location)


def make_image(options: argparse.Namespace) -> None:
    """Make an image of a checkpoint archive; prints its name in full and its id."""
    path = str(Path(options.archive).absolute())
    request = agent_pb2.ImageFromCheckpointRequest(path=path, name=options.name)
    with connect(options) as client:
        answer = client.call(
            request, agent_pb2.ImageFromCheckpointResponse, f"make an image of {options.archive}", timeout=None
        )
    print(f"{answer.name}  {answer.id}")
