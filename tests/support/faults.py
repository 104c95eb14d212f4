"""Faults that a test injects at the stages of an agent.

A comma-separated list of ``Operation.stage:when:action``. *when* is ``before`` or ``after``. *action* is ``kill``
(SIGKILL to this process), ``error`` (an internal error), ``hang`` (wait until cancelled) or ``block`` (block the event
loop). ``@/path`` names a file with such a list, which is read at every stage, so that a test can change the faults of a
running process.

``python -m tests.support.faults FAULTS serve ...`` runs the ``podkeel`` command with these faults.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from pathlib import Path

from host import stages
from host.errors import PodkeelError

_log = logging.getLogger("podkeel.stages")


class Faults:
    """A hook for ``stages.faults_of``. Raises ValueError for an invalid list."""

    def __init__(self, text: str) -> None:
        self._file = Path(text[1:]) if text.startswith("@") else None
        self._fixed = {} if self._file is not None else _parsed(text)

    async def __call__(self, point: str) -> None:
        faults = self._fixed if self._file is None else _parsed(self._file.read_text())
        match faults.get(point):
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "error":
                raise PodkeelError(f"fault planted at {point}")
            case "hang":
                _log.warning("faults: %s: hanging", point)
                await asyncio.Event().wait()
            case "block":
                _block()


def _block() -> None:
    while True:
        time.sleep(1)


def _parsed(text: str) -> dict[str, str]:
    faults: dict[str, str] = {}
    for item in filter(None, text.split(",")):
        point, _, action = item.strip().rpartition(":")
        if action not in ("kill", "error", "hang", "block") or not point.endswith((":before", ":after")):
            raise ValueError(f"{item!r} is not Operation.stage:before|after:kill|error|hang|block")
        faults[point] = action
    return faults


def main(faults: str, words: list[str]) -> int:
    """Run one ``podkeel`` command with faults. Returns its exit status."""
    from cli.main import main as podkeel

    with stages.faults_of(Faults(faults)):
        return podkeel(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
