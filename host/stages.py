"""Named stages of an operation: their start and duration are kept.

Tests make an operation fail before or after a stage by ``faults_of``. The agent's own code never calls it, and no
option or environment variable does: without it, a stage costs two clock readings.
"""

from __future__ import annotations

import errno
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from host.errors import LimitError, PodkeelError

# Called for every stage that ends, with operation, stage, seconds, and whether it failed.
StageObserver = Callable[[str, str, float, bool], object]
_observers: list[StageObserver] = []

# Awaited before and after each stage with ``Operation.stage:before`` or ``Operation.stage:after``; what it raises fails
# the stage.
FaultHook = Callable[[str], Awaitable[None]]
_fault_hook: FaultHook | None = None

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

    def stage(self, name: str) -> AbstractAsyncContextManager[None]:
        """Run the block as stage ``name``; an error that leaves it says so, keeping its kind.

        A full disk is a LimitError, any other OSError a PodkeelError.
        """
        return self._run(name, observed=True)

    def foreign_stage(self, name: str) -> AbstractAsyncContextManager[None]:
        """The same with a name that is not the agent's own: it is kept with the operation, and becomes no metric."""
        return self._run(name, observed=False)

    @asynccontextmanager
    async def _run(self, name: str, *, observed: bool) -> AsyncIterator[None]:
        stage = Stage(name, time.time_ns())
        self.stages.append(stage)
        begin = time.perf_counter()
        try:
            if _fault_hook is not None:
                await _fault_hook(f"{self.name}.{name}:before")
            yield
            if _fault_hook is not None:
                await _fault_hook(f"{self.name}.{name}:after")
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
            for observer in _observers if observed else ():
                observer(self.name, name, stage.seconds, stage.failed)

    def _place(self, stage: str) -> str:
        return f"{self.subject}, step {stage}" if self.subject else f"step {stage}"


@contextmanager
def observed_by(observer: StageObserver) -> Iterator[None]:
    """Call ``observer`` for every stage of this process that ends during the block."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


@contextmanager
def faults_of(hook: FaultHook) -> Iterator[None]:
    """Have all stages of this process meet the faults of ``hook`` during the block: for tests."""
    global _fault_hook  # noqa: PLW0603 - one for the process, as the observers are
    before, _fault_hook = _fault_hook, hook
    try:
        yield
    finally:
        _fault_hook = before


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
