"""``podkeel logs``."""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from cli.client import Client
from cli.connect import connect
from cli.log_file import LogLine, LogReader
from cli.lookup import find_container
from host.errors import InvalidArgumentError, NotFoundError
from proto.runtime.v1 import cri_pb2

_POLL_SECONDS = 0.1


def logs(options: argparse.Namespace) -> None:
    """Print a container's log; its standard error is printed to ours."""
    if options.tail is not None and options.tail < 0:
        raise InvalidArgumentError("--tail takes a number of lines, 0 or more")
    with connect(options) as client:
        container = find_container(client, options.container)
        path = client.call(_status_request(container.id), cri_pb2.ContainerStatusResponse, "read log").status.log_path
        if not path:
            raise NotFoundError(f"container {container.metadata.name} was created without a log")
        with LogReader(Path(path)) as reader:
            running = _is_running(client, container.id)
            lines: Iterable[LogLine] = reader.lines()
            _write(lines if options.tail is None else deque(lines, maxlen=options.tail), options.timestamps)
            while options.follow and running:
                time.sleep(_POLL_SECONDS)
                # Asked before reading: what it wrote before it ended is then in the file.
                running = _is_running(client, container.id)
                _write(reader.lines(), options.timestamps)
            if not running:
                _write(reader.rest(), options.timestamps)


def _status_request(container_id: str) -> cri_pb2.ContainerStatusRequest:
    return cri_pb2.ContainerStatusRequest(container_id=container_id)


def _is_running(client: Client, container_id: str) -> bool:
    try:
        status = client.call(_status_request(container_id), cri_pb2.ContainerStatusResponse, "follow log").status
    except NotFoundError:
        return False
    return status.state in (cri_pb2.CONTAINER_CREATED, cri_pb2.CONTAINER_RUNNING)


def _write(lines: Iterable[LogLine], timestamps: bool) -> None:
    for line in lines:
        target = sys.stderr if line.stream == "stderr" else sys.stdout
        target.buffer.write(f"{line.time} ".encode() + line.content if timestamps else line.content)
    sys.stdout.flush()
    sys.stderr.flush()
