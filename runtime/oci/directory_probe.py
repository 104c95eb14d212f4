"""What an OCI runtime does with working directories outside of a container, found out by trying."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Protocol

import msgspec

from host import processes

_SECONDS = 30.0
# By which number the descriptor of a directory is handed to an OCI runtime, also for real.
DIRECTORY_DESCRIPTOR = 6
DIRECTORY_BY_DESCRIPTOR = f"/proc/self/fd/{DIRECTORY_DESCRIPTOR}"


class Runtime(Protocol):
    """An OCI runtime as far as it is tried here."""

    def command(self, *words: str) -> list[str]:
        """A whole command line."""


class DirectoryBehaviour(msgspec.Struct, frozen=True):
    """``refuses_outside``: it starts no command whose working directory is outside of the container's root, whatever
    its name. ``enters_descriptors``: the name may be that of a descriptor it was handed.
    """

    refuses_outside: bool = False
    enters_descriptors: bool = False


async def probe_directories(runtime: Runtime, bundle: Path, container_id: str) -> DirectoryBehaviour:
    """Run the container of ``bundle`` and commands in it; the caller removes it.

    Its ``/init`` waits for its end when it is its first process, and otherwise ends; its ``/host`` is the node's /proc.
    Raises PodkeelError when it does not run at all.
    """
    pid_file = bundle / "pid"
    words = ("run", "--detach", "--bundle", str(bundle), "--pid-file", str(pid_file), container_id)
    await processes.run(runtime.command(*words), timeout=_SECONDS)
    root = os.open(f"/proc/{int(pid_file.read_text())}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        descriptors = {DIRECTORY_DESCRIPTOR: root}
        inside, outside, by_descriptor = await asyncio.gather(
            _runs_in(runtime, container_id, "/", {}),
            _runs_in(runtime, container_id, f"/host/{os.getpid()}/root", {}),
            _runs_in(runtime, container_id, DIRECTORY_BY_DESCRIPTOR, descriptors),
        )
    finally:
        os.close(root)
    return DirectoryBehaviour(refuses_outside=inside and not outside, enters_descriptors=inside and by_descriptor)


async def _runs_in(runtime: Runtime, container_id: str, directory: str, descriptors: dict[int, int]) -> bool:
    command = runtime.command("exec", "--cwd", directory, container_id, "/init", "--version")
    done = await processes.run(command, descriptors=descriptors, timeout=_SECONDS, check=False)
    return done.status == 0
