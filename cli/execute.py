"""``podkeel exec`` and ``podkeel attach``."""

from __future__ import annotations

import argparse
import asyncio

from cli import terminal
from cli.connect import connect
from cli.lookup import find_container
from cli.remote_command import remote_command
from cli.stream_client import run
from host.errors import DeadlineError, InvalidArgumentError
from proto.runtime.v1 import cri_pb2


def execute(options: argparse.Namespace) -> int:
    """Run a command in a container with our standard streams; its exit code is ours."""
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        raise InvalidArgumentError("say which command to run, as in `podkeel exec CONTAINER ls -l`")
    _check_terminal(options)
    with connect(options) as client:
        container = find_container(client, options.container)
        request = cri_pb2.ExecRequest(
            container_id=container.id,
            cmd=command,
            tty=options.tty,
            stdin=options.stdin,
            stdout=True,
            stderr=not options.tty,
        )
        url = client.call(request, cri_pb2.ExecResponse, f"run {command[0]}").url
    return _join(url, options, f"{command[0]} did not finish within {options.timeout} s", options.timeout)


def attach(options: argparse.Namespace) -> int:
    """Join our standard streams to a running container's until it ends; leaving leaves it running."""
    _check_terminal(options)
    with connect(options) as client:
        container = find_container(client, options.container)
        request = cri_pb2.AttachRequest(
            container_id=container.id, tty=options.tty, stdin=options.stdin, stdout=True, stderr=not options.tty
        )
        url = client.call(request, cri_pb2.AttachResponse, "attach").url
    return _join(url, options, "", 0)


def _check_terminal(options: argparse.Namespace) -> None:
    if options.tty and options.stdin and not terminal.is_terminal(0):
        raise InvalidArgumentError("standard input is no terminal: leave out -t")


def _join(url: str, options: argparse.Namespace, too_late: str, timeout: float) -> int:
    async def join() -> int:
        try:
            async with asyncio.timeout(timeout or None):
                return await remote_command(url, stdin=options.stdin, tty=options.tty)
        except TimeoutError as error:
            raise DeadlineError(too_late) from error

    return run(join)
