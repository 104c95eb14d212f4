"""``podkeel exec``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from cli.client import CALL_SECONDS, Client
from cli.connect import connect
from cli.lookup import find_container
from host.errors import InvalidArgumentError
from proto.runtime.v1 import cri_pb2


def execute(options: argparse.Namespace) -> int:
    """Run a command in a container; its exit code is ours."""
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        raise InvalidArgumentError("say which command to run, as in `podkeel exec CONTAINER ls -l`")
    with connect(options) as client:
        container = find_container(client, options.container)
        answer = exec_sync(client, container.id, command, options.timeout)
    for stream, output in ((sys.stdout, answer.stdout), (sys.stderr, answer.stderr)):
        stream.buffer.write(output)
        stream.flush()
    return answer.exit_code


def exec_sync(client: Client, container_id: str, command: Sequence[str], timeout: int = 0) -> cri_pb2.ExecSyncResponse:
    """Run ``command`` to its end, at most ``timeout`` seconds (0: as long as it takes)."""
    request = cri_pb2.ExecSyncRequest(container_id=container_id, cmd=command, timeout=timeout)
    limit = timeout + CALL_SECONDS if timeout else None
    return client.call(request, cri_pb2.ExecSyncResponse, f"run {command[0]}", timeout=limit)
