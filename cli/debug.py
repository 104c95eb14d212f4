"""``podkeel debug`` and ``podkeel debug bundle``: what the agent is doing, for people who look for a fault in it."""

from __future__ import annotations

import argparse
import io
import os
import platform
import signal
import socket
import struct
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cli.agent.config import as_toml, load_for
from cli.agent.secrets import without_secrets
from cli.connect import connect
from host.errors import DeadlineError, InvalidArgumentError, PodkeelError, printable

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from cli.client import Client

_ANSWER_SECONDS = 10.0
_COMMAND_SECONDS = 20.0
_LOG_LINES = "5000"
_MAX_BYTES = 32 << 20  # of one file of the bundle
_CREDENTIALS = struct.Struct("3i")  # struct ucred of unix(7): pid, uid, gid


def debug(options: argparse.Namespace) -> None:
    """Print what the agent is doing."""
    with connect(options) as client:
        print(_diagnosis(client))


def bundle(options: argparse.Namespace) -> None:
    """Write everything that a bug report needs to an archive that only its owner can read."""
    path = Path(options.file)
    folder = path.name.removesuffix(".gz").removesuffix(".tar").removesuffix(".tgz") or "podkeel"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise InvalidArgumentError(f"bundle {path}: cannot be made: {error.strerror}") from error
    with (
        connect(options) as client,
        os.fdopen(descriptor, "wb") as file,
        tarfile.open(fileobj=file, mode="w:gz") as tar,
    ):
        for name, content in _contents(client):
            data = without_secrets(printable(content)).encode()[:_MAX_BYTES]
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size, member.mode, member.mtime = len(data), 0o600, int(time.time())
            tar.addfile(member, io.BytesIO(data))
    print(path)


def _contents(client: Client) -> Iterator[tuple[str, str]]:
    """The files of a bundle. A file that cannot be made holds the reason instead."""
    from google.protobuf.json_format import MessageToJson

    from proto.podkeel.v1 import agent_pb2
    from proto.runtime.v1 import cri_pb2

    def answer(request: Message, response: type[Message]) -> Callable[[], str]:
        return lambda: MessageToJson(client.call(request, response, timeout=_ANSWER_SECONDS))

    parts: dict[str, Callable[[], str]] = {
        "diagnosis.txt": lambda: _diagnosis(client),
        "version.json": answer(cri_pb2.VersionRequest(), cri_pb2.VersionResponse),
        "status.json": answer(cri_pb2.StatusRequest(verbose=True), cri_pb2.StatusResponse),
        "check.json": answer(agent_pb2.CheckRequest(), agent_pb2.CheckResponse),
        "config.toml": lambda: as_toml(load_for(argparse.Namespace())),
        "node.txt": _node,
        "programs.txt": _programs,
        "journal.txt": lambda: _run("journalctl", "--no-pager", "-u", "podkeel", "-n", _LOG_LINES),
    }
    for name, content in parts.items():
        try:
            yield name, content()
        except (PodkeelError, OSError) as error:
            yield name, f"not available: {error}\n"


def _diagnosis(client: Client) -> str:
    from proto.podkeel.v1 import agent_pb2

    request = agent_pb2.DiagnoseRequest()
    try:
        return client.call(request, agent_pb2.DiagnoseResponse, "ask for a diagnosis", timeout=_ANSWER_SECONDS).text
    except DeadlineError as error:
        raise DeadlineError(
            f"the agent does not answer within {_ANSWER_SECONDS:g} s: {_ask_by_signal(client)}"
        ) from error


def _ask_by_signal(client: Client) -> str:
    """Have a hanging agent write its stacks to its log, and return what was done about it."""
    pid = _pid_behind(client.socket)
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        return f"its process {pid} cannot be signalled: {error.strerror}"
    try:
        # systemd listens for an agent that has not started. It takes this signal as its own crash.
        if Path(f"/proc/{pid}/comm").read_text(errors="replace").strip() == "systemd":
            return "systemd listens on its socket: is the agent starting? See `journalctl -u podkeel`"
        signal.pidfd_send_signal(pidfd, signal.SIGQUIT)
    except OSError as error:
        return f"its process {pid} cannot be signalled: {error.strerror}"
    finally:
        os.close(pidfd)
    return f"its process {pid} got SIGQUIT and writes its stacks to its log (journalctl -u podkeel)"


def _pid_behind(address: str) -> int:
    """The process that listens on a unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(address.removeprefix("unix://"))
        pid, _, _ = _CREDENTIALS.unpack(probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        return int(pid)


def _node() -> str:
    mounts = Path("/proc/self/mountinfo").read_bytes().count(b"\n")
    lines = [" ".join(platform.uname()), f"mounts of this namespace: {mounts}"]
    for name in ("/etc/os-release", "/proc/cgroups", "/proc/meminfo", "/proc/loadavg", "/proc/filesystems"):
        lines += ["", f"== {name}", Path(name).read_text(errors="replace")]
    return "\n".join(lines)


def _programs() -> str:
    names = ("crun", "runc", "conmon", "catatonit", "nft", "criu", "systemctl")
    return "\n".join(f"== {name}\n{_run(name, '--version')}" for name in names)


def _run(*command: str) -> str:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_COMMAND_SECONDS, check=False
        )
    except FileNotFoundError:
        return f"{command[0]}: not installed\n"
    except subprocess.TimeoutExpired:
        return f"{command[0]}: not finished within {_COMMAND_SECONDS:g} s\n"
    return (done.stdout + done.stderr).decode(errors="replace")
