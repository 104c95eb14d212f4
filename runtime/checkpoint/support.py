"""Whether this node can make checkpoints: CRIU, and the OCI runtimes that work with it. Tested once, at the start."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from host import processes
from host.concurrency.threads import in_thread
from host.errors import PodkeelError, UnsupportedError
from runtime.checkpoint.options import CheckpointOptions
from runtime.oci.handlers import Handlers
from runtime.oci.oci_runtime import OciRuntime

_SECONDS = 20.0
_MAX_LINE_LENGTH = 300
_OFF = "checkpoints are off (checkpoint.enabled)"

_log = logging.getLogger("podkeel.checkpoint")


class CheckpointSupport:
    """The runtime handlers that can make checkpoints, and why the others cannot.

    ``version`` is the version of CRIU, empty if it is not installed. ``problem`` is the reason why no handler can make
    checkpoints; empty if a handler may be able to.
    """

    def __init__(self, options: CheckpointOptions, handlers: Handlers) -> None:
        self._options = options
        self._handlers = handlers
        self._refusals: dict[str, str] = {}
        self._probing: asyncio.Task[None] | None = None
        self.version = ""
        self.problem = ""

    def begin(self) -> None:
        """Begin the tests in the background."""
        self._probing = asyncio.create_task(self._probe())

    async def known(self) -> None:
        """Wait until the result is known."""
        if self._probing is not None:
            await asyncio.shield(self._probing)

    async def close(self) -> None:
        """Stop the tests."""
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.wait((self._probing,))

    async def require(self, runtime: OciRuntime | None, handler: str) -> None:
        """Raise UnsupportedError, with the reason, if the handler cannot make checkpoints here."""
        await self.known()
        why = self.refusal(handler) if runtime is not None else "the handler no longer works on this node"
        if why:
            raise UnsupportedError(f"runtime handler {handler!r} cannot make checkpoints on this node: {why}")

    def refusal(self, handler: str) -> str:
        """Why a handler cannot make checkpoints; empty if it can."""
        return self.problem or self._refusals.get(handler, "")

    def environment(self, configuration: Path) -> dict[str, str]:
        """The environment for an OCI runtime that calls CRIU, so that it finds CRIU, and CRIU reads only
        ``configuration``.
        """
        program = shutil.which(self._options.criu_path)
        folder = str(Path(program).parent) if program else ""
        path = ":".join(filter(None, (folder, os.environ.get("PATH", os.defpath))))
        return {**os.environ, "PATH": path, "CRIU_CONFIG_FILE": str(configuration), "LC_ALL": "C"}

    @property
    def failure_log_dir(self) -> str:
        """The folder in which CRIU's log of a failure is kept; empty if none is kept."""
        return self._options.failure_log_dir

    @property
    def closes_connections(self) -> bool:
        """Whether this CRIU leaves established TCP connections out of a checkpoint; older ones must save them."""
        match = re.match(r"(\d+)\.", self.version)
        return match is not None and int(match[1]) >= 4

    def report(self) -> dict[str, Any]:
        """The result for the verbose status."""
        handlers = {runtime.name: self.refusal(runtime.name) or "able" for runtime in self._handlers.working()}
        others = [runtime.name for runtime in self._handlers.working() if not runtime.features.is_crun]
        only = {name: "it saves containers and restores none: use crun" for name in others if handlers[name] == "able"}
        return {
            "enabled": self._options.enabled,
            "criu": self.version,
            "problem": self.problem,
            "handlers": handlers,
            "podsAndRestores": {**handlers, **only},
        }

    async def _probe(self) -> None:
        try:
            self.problem = await self._criu_problem()
            if not self.problem:
                runtimes = self._handlers.working()
                refusals = await asyncio.gather(*(_refusal(runtime) for runtime in runtimes))
                named = zip((runtime.name for runtime in runtimes), refusals, strict=True)
                self._refusals = {name: refusal for name, refusal in named if refusal}
        except (PodkeelError, OSError) as error:
            self.problem = f"CRIU cannot be tried: {error}"
        able = [runtime.name for runtime in self._handlers.working() if not self.refusal(runtime.name)]
        if able:
            _log.info("checkpoint: CRIU %s works with: %s", self.version, ", ".join(able))
        else:
            reasons = self.problem or "; ".join(f"{name}: {why}" for name, why in self._refusals.items())
            _log.info("checkpoint: not possible on this node: %s", reasons)

    async def _criu_problem(self) -> str:
        if not self._options.enabled:
            return _OFF
        program = await in_thread(shutil.which, self._options.criu_path)
        if program is None:
            return f"CRIU is not installed ({self._options.criu_path}, checkpoint.criu_path): install the package criu"
        version = await processes.run([program, "--version"], check=False, timeout=_SECONDS)
        match = re.search(rb"^Version: (\S+)", version.stdout, re.MULTILINE)
        if match is None:
            return f"{program} does not print its version: {_last_line(version)}"
        self.version = match[1].decode(errors="replace")
        checked = await processes.run([program, "check"], check=False, timeout=_SECONDS)
        if checked.status != 0:
            return f"CRIU {self.version} does not work with this kernel (criu check: {_last_line(checked)})"
        return ""


async def _refusal(runtime: OciRuntime) -> str:
    """Why an OCI runtime cannot work with the installed CRIU; empty if it can."""
    if runtime.features.version.startswith("runc "):
        return ""
    version = await processes.run([runtime.program, "--version"], check=False, timeout=_SECONDS)
    if b"+CRIU" not in version.stdout:
        return f"{runtime.options.path} is built without CRIU"
    cache = await in_thread(shutil.which, "ldconfig", path=f"{os.environ.get('PATH', '')}:/sbin")
    if cache is not None:
        libraries = await processes.run([cache, "-p"], check=False, timeout=_SECONDS)
        if libraries.status == 0 and b"libcriu.so.2" not in libraries.stdout:
            return f"{runtime.options.path} needs the library libcriu.so.2: install the package libcriu2"
    return ""


def _last_line(completed: processes.Completed) -> str:
    text = (completed.stderr or completed.stdout).decode(errors="replace").strip()
    lines = [line for line in text.splitlines() if "Error" in line] or text.splitlines()
    return lines[-1][:_MAX_LINE_LENGTH] if lines else f"exit status {completed.status}"
