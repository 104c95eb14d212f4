"""Named stages of an operation: their start and duration are kept, and a test may plant a fault at each of them.

Faults come from the environment variable ``PODKEEL_FAULTS``, for tests only: a comma-separated list of
``Operation.stage:when:action`` where *when* is ``before`` or ``after`` and *action* is ``kill`` (SIGKILL to this
process), ``error`` (an internal error) or ``hang`` (wait until cancelled). ``@/path`` names a file that holds such a
list and is read at every stage, so that one process can meet many faults. Unset, a stage costs two clock readings.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from host.errors import LimitError, PodkeelError

_log = logging.getLogger("podkeel.stages")

# Told of every stage that ends: operation, stage, seconds, and whether it failed.
StageObserver = Callable[[str, str, float, bool], object]
_observers: list[StageObserver] = []

_FAILURES_KEPT = 64
_failed: deque[Operation] = deque(maxlen=_FAILURES_KEPT)

_EXHAUSTED = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)


@dataclass(slots=True)
class Stage:
    """One stage: ``started`` in nanoseconds since the epoch; ``seconds`` is None while it runs."""

    name: str
    started: int
    seconds: float | None = None
    failed: bool = False


@dataclass(slots=True)
class Operation:
    """One run of a named operation (``RunPodSandbox``…) on one object, with the stages it went through."""

    name: str
    subject: str = ""
    started: int = field(default_factory=time.time_ns)
    stages: list[Stage] = field(default_factory=list)

    def __post_init__(self) -> None:
        gathering = _gathering.get()
        if gathering is not None and gathering.operations is not None:
            gathering.operations.append(self)

    @asynccontextmanager
    async def stage(self, name: str) -> AsyncIterator[None]:
        """Run the block as stage ``name``; an error that leaves it says so, keeping its kind.

        A full disk is a LimitError, any other OSError a PodkeelError.
        """
        stage = Stage(name, time.time_ns())
        self.stages.append(stage)
        begin = time.perf_counter()
        try:
            if _faults:
                await _fault(f"{self.name}.{name}:before")
            yield
            if _faults:
                await _fault(f"{self.name}.{name}:after")
        except PodkeelError as error:
            stage.failed = True
            error.add_context(self._place(name))
            raise
        except OSError as error:
            stage.failed = True
            kind = LimitError if error.errno in _EXHAUSTED else PodkeelError
            raise kind(f"{self._place(name)}: {error}") from error
        except BaseException:
            stage.failed = True
            raise
        finally:
            stage.seconds = time.perf_counter() - begin
            if stage.failed and not any(known is self for known in _failed):
                _failed.append(self)
            for observer in _observers:
                observer(self.name, name, stage.seconds, stage.failed)

    def _place(self, stage: str) -> str:
        return f"{self.subject}, step {stage}" if self.subject else f"step {stage}"


@contextmanager
def observed_by(observer: StageObserver) -> Iterator[None]:
    """Tell ``observer`` of every stage of this process that ends during the block."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


@dataclass(slots=True)
class _Gathering:
    """``operations`` is None after its block: tasks that outlive the block add nothing any more."""

    operations: list[Operation] | None


_gathering: ContextVar[_Gathering | None] = ContextVar("gathering", default=None)


@contextmanager
def gathered_operations() -> Iterator[list[Operation]]:
    """The operations that begin during the block in this task, and in the tasks that it starts."""
    operations: list[Operation] = []
    gathering = _Gathering(operations)
    _gathering.set(gathering)
    try:
        yield operations
    finally:
        gathering.operations = None


def failed_operations() -> list[Operation]:
    """The last operations of which a stage failed or was cancelled, oldest first: their objects may be gone."""
    return list(_failed)


def _parse_faults(text: str) -> dict[str, str]:
    faults: dict[str, str] = {}
    for item in filter(None, text.split(",")):
        point, _, action = item.strip().rpartition(":")
        if action not in ("kill", "error", "hang") or not point.endswith((":before", ":after")):
            raise PodkeelError(f"PODKEEL_FAULTS: {item!r} is not Operation.stage:before|after:kill|error|hang")
        faults[point] = action
    return faults


async def _fault(point: str) -> None:
    faults = _parse_faults(Path(_faults[1:]).read_text()) if _faults.startswith("@") else _parse_faults(_faults)
    match faults.get(point):
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "error":
            raise PodkeelError(f"fault planted at {point}")
        case "hang":
            _log.warning("hanging at %s", point)
            await asyncio.Event().wait()


_faults = os.environ.get("PODKEEL_FAULTS", "")
if not _faults.startswith("@"):
    _parse_faults(_faults)
