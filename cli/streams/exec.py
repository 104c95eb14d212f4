"""``podkeel exec`` and ``podkeel attach``."""

from __future__ import annotations

import argparse
import asyncio
import signal

from cli.connect import connect
from cli.lookup import find_container
from cli.streams import detach_keys, terminal
from cli.streams.client import run
from cli.streams.remote_command import remote_command
from cli.streams.tls import TlsFiles
from cli.text import note
from host.errors import DeadlineError, InvalidArgumentError
from proto.runtime.v1 import cri_pb2

_KILLED = 128 + signal.SIGKILL


def execute(options: argparse.Namespace) -> int:
    """Run a command in a container with the standard streams of this process; returns its exit code."""
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        raise InvalidArgumentError("say which command to run, as in `podkeel exec CONTAINER ls -l`")
    keys = _detach_keys(options)
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
    code = _join(url, options, keys, f"{command[0]} did not finish within {options.timeout} s", options.timeout)
    if code is None:
        note(f"left {container.metadata.name}: {command[0]} is ended")
        return _KILLED
    return code


def attach(options: argparse.Namespace) -> int:
    """Connect our standard streams to a running container's until it ends. If we end first, the container continues."""
    keys = _detach_keys(options)
    with connect(options) as client:
        container = find_container(client, options.container)
        request = cri_pb2.AttachRequest(
            container_id=container.id, tty=options.tty, stdin=options.stdin, stdout=True, stderr=not options.tty
        )
        url = client.call(request, cri_pb2.AttachResponse, "attach").url
    code = _join(url, options, keys, "", 0)
    if code is None:
        note(f"detached from {container.metadata.name}: it keeps running")
        return 0
    return code


def _detach_keys(options: argparse.Namespace) -> bytes:
    """The keys to detach. Raises InvalidArgumentError if they are invalid, or if there is no terminal."""
    if options.tty and options.stdin and not terminal.is_terminal(0):
        raise InvalidArgumentError("standard input is no terminal: leave out -t")
    return detach_keys.parse(options.detach_keys)


def _join(url: str, options: argparse.Namespace, keys: bytes, too_late: str, timeout: float) -> int | None:
    tls = TlsFiles.of(options)

    async def join() -> int | None:
        try:
            async with asyncio.timeout(timeout or None):
                return await remote_command(url, tls, stdin=options.stdin, tty=options.tty, detach_keys=keys)
        except TimeoutError as error:
            raise DeadlineError(too_late) from error

    return run(join)
