"""Calls one plugin: a program with CNI_* variables, JSON as input and output (CNI specification 1.1.0, section 2)."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from host import processes, untrusted_json
from host.concurrency.threads import in_network_thread
from host.errors import DeadlineError, PodkeelError, UnavailableError
from host.untrusted_json import JsonError

_MAX_OUTPUT_BYTES = 1024 * 1024
_CALLS_AT_ONCE = max(8, 4 * (os.cpu_count() or 1))
_NICENESS = 5
_SHOWN_CHARACTERS = 200
_TRY_AGAIN_LATER = 11
_NOT_AVAILABLE = (50, 51)


class PluginMissingError(UnavailableError):
    """The program of a CNI plugin is not installed. (NotFoundError would mean that the pod is missing.)"""


class Reply(msgspec.Struct, frozen=True, rename={"supported": "supportedVersions"}):
    """A plugin's answer to VERSION."""

    supported: tuple[str, ...]


class _Failure(msgspec.Struct, frozen=True):
    code: int
    msg: str = ""
    details: str = ""


class Call(msgspec.Struct, frozen=True):
    """The operation that plugins do, and its attachment (none if the fields are empty)."""

    command: str
    sandbox_id: str = ""
    netns_path: str = ""
    interface: str = ""
    arguments: str = ""


class PluginRunner:
    """Finds plugins in ``folders`` and runs them. A call takes ``seconds`` at most; the number of calls is limited."""

    def __init__(self, folders: Sequence[str], seconds: float) -> None:
        self.configure(folders, seconds)
        self._slots = asyncio.Semaphore(_CALLS_AT_ONCE)
        self._starting = asyncio.Lock()

    def configure(self, folders: Sequence[str], seconds: float) -> None:
        """Use other folders and another time limit for calls that begin later."""
        self._folders = tuple(folders)
        self._seconds = seconds

    def find(self, kind: str) -> Path:
        """The program of a plugin; blocking. Raises PluginMissingError."""
        for folder in self._folders:
            path = Path(folder) / kind
            if path.is_file() and os.access(path, os.X_OK):
                return path
        raise PluginMissingError(f"CNI plugin {kind} is in none of {', '.join(self._folders)}: install it there")

    async def run(self, kind: str, call: Call, settings: Mapping[str, Any]) -> bytes:
        """Run one plugin and return its output.

        Raises:
            PluginMissingError: the program is missing.
            DeadlineError: the plugin took too long and was killed.
            UnavailableError: the plugin answers that trying later may help.
            PodkeelError: the plugin failed; the message has its code and text, or how it ended.
        """
        program = await in_network_thread(self.find, kind)
        async with self._slots:
            try:
                completed = await self._spawn(program, msgspec.json.encode(settings), self._environment(call))
            except DeadlineError as error:
                raise DeadlineError(
                    f"CNI plugin {kind}, {call.command}: did not finish within {self._seconds:g} s and was killed"
                ) from error
            except OSError as error:
                raise PodkeelError(f"CNI plugin {kind}, {call.command}: {program} cannot be run: {error}") from error
        if completed.status != 0:
            raise _failure(f"CNI plugin {kind}, {call.command}", completed)
        return completed.stdout

    async def _spawn(self, program: Path, settings: bytes, variables: Mapping[str, str]) -> processes.Completed:
        """Run the program. One waiting call begins in each turn of the loop, because starting a process blocks it."""
        await self._starting.acquire()
        with contextlib.ExitStack() as stack:
            stack.callback(self._starting.release)

            def started(pid: int) -> None:
                stack.close()
                _lower_priority(pid)

            return await processes.run(
                [str(program)],
                stdin=settings,
                environment={**os.environ, **variables},
                timeout=self._seconds,
                check=False,
                limit=_MAX_OUTPUT_BYTES,
                on_start=started,
            )

    def _environment(self, call: Call) -> dict[str, str]:
        return {
            "CNI_COMMAND": call.command,
            "CNI_CONTAINERID": call.sandbox_id,
            "CNI_NETNS": call.netns_path,
            "CNI_IFNAME": call.interface,
            "CNI_ARGS": call.arguments,
            "CNI_PATH": ":".join(self._folders),
        }


def _lower_priority(pid: int) -> None:
    """Lower the plugin's priority, so that many plugins at once do not delay the agent's loop."""
    with contextlib.suppress(OSError):  # it has ended already
        os.setpriority(os.PRIO_PROCESS, pid, _NICENESS)


def _failure(what: str, completed: processes.Completed) -> PodkeelError:
    try:
        reported = untrusted_json.decode(completed.stdout, _Failure)
    except JsonError:
        return PodkeelError(f"{what}: {_ending(completed)}")
    text = f"{reported.msg} ({reported.details})" if reported.details else reported.msg
    kind = UnavailableError if reported.code in (_TRY_AGAIN_LATER, *_NOT_AVAILABLE) else PodkeelError
    return kind(f"{what}: failed with code {reported.code}: {text}")


def _ending(completed: processes.Completed) -> str:
    how = (
        f"was killed by signal {-completed.status}"
        if completed.status < 0
        else f"ended with status {completed.status} and printed no error"
    )
    said = (completed.stderr or completed.stdout).decode(errors="replace").strip()
    if len(said) > 2 * _SHOWN_CHARACTERS:
        said = f"{said[:_SHOWN_CHARACTERS]} … {said[-_SHOWN_CHARACTERS:]}"
    return f"{how}: {said}" if said else how
