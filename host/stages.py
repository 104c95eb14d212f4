"""Named stages of an operation. The start and duration of each are kept.

Tests make an operation fail before or after a stage with ``faults_of``. The agent's own code never calls it, and no
option or environment variable does. Without it, a stage costs two readings of the clock.
"""

from __future__ import annotations

import errno
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType

from host.errors import LimitError, PodkeelError

# Called with operation, stage, seconds and whether it failed, for every stage that ends.
StageObserver = Callable[[str, str, float, bool], object]
_observers: list[StageObserver] = []

# Awaited before and after each stage with ``Operation.stage:before`` or ``Operation.stage:after``. If it raises, the
# stage fails.
FaultHook = Callable[[str], Awaitable[None]]
_fault_hook: FaultHook | None = None

_FAILURES_KEPT = 64
_failed: deque[Operation] = deque(maxlen=_FAILURES_KEPT)

_open: dict[int, tuple[Operation, Stage]] = {}

_EXHAUSTED = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EUSERS)


@dataclass(slots=True)
class Stage:
    """One stage: ``started`` in nanoseconds since the epoch; ``seconds`` is None while it runs."""

    name: str
    started: int
    seconds: float | None = None
    failed: bool = False


@dataclass(slots=True)
class Operation:
    """One run of a named operation (``RunPodSandbox``…) on one object, with its stages."""

    name: str
    subject: str = ""
    started: int = field(default_factory=time.time_ns)
    stages: list[Stage] = field(default_factory=list)

    def __post_init__(self) -> None:
        gathering = _gathering.get()
        if gathering is not None and gathering.operations is not None:
            gathering.operations.append(self)

    def stage(self, name: str) -> AbstractAsyncContextManager[None]:
        """Run the block as the stage ``name``. An error gets the stage in its message; its kind stays.

        A full disk becomes a LimitError, any other OSError a PodkeelError.
        """
        return _Run(self, name, observed=True)

    def foreign_stage(self, name: str) -> AbstractAsyncContextManager[None]:
        """As ``stage``, for a name that another program chose: it is kept with the operation but is no metric."""
        return _Run(self, name, observed=False)

    def place(self, stage: str) -> str:
        """The beginning of the errors of a stage."""
        return f"{self.subject}, step {stage}" if self.subject else f"step {stage}"


class _Run(AbstractAsyncContextManager[None]):
    """One running stage. A class instead of a generator, which would cost several times as much."""

    __slots__ = ("_begin", "_observed", "_operation", "_stage")

    def __init__(self, operation: Operation, name: str, *, observed: bool) -> None:
        self._operation = operation
        self._observed = observed
        self._stage = Stage(name, 0)
        self._begin = 0.0

    async def __aenter__(self) -> None:
        self._stage.started = time.time_ns()
        _open[id(self._stage)] = self._operation, self._stage
        self._operation.stages.append(self._stage)
        self._begin = time.perf_counter()
        if _fault_hook is not None:
            await self._call_fault_hook(_fault_hook, "before")

    async def __aexit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if error is None and _fault_hook is not None:
            await self._call_fault_hook(_fault_hook, "after")
        self._end(error)

    async def _call_fault_hook(self, hook: FaultHook, where: str) -> None:
        try:
            await hook(f"{self._operation.name}.{self._stage.name}:{where}")
        except BaseException as error:
            self._end(error)
            raise

    def _end(self, error: BaseException | None) -> None:
        """Record the end, and add the stage to ``error``. Raises a PodkeelError instead of an OSError."""
        operation, stage = self._operation, self._stage
        _open.pop(id(stage), None)
        stage.seconds = time.perf_counter() - self._begin
        if error is not None:
            stage.failed = True
            if not any(known is operation for known in _failed):
                _failed.append(operation)
        for observer in _observers if self._observed else ():
            observer(operation.name, stage.name, stage.seconds, stage.failed)
        if isinstance(error, PodkeelError):
            error.add_context(operation.place(stage.name))
        elif isinstance(error, OSError):
            kind = LimitError if error.errno in _EXHAUSTED else PodkeelError
            raise kind(f"{operation.place(stage.name)}: {error}") from error


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
    """Call ``hook`` before and after all stages of this process during the block. For tests only."""
    global _fault_hook  # noqa: PLW0603 - one for the process, like the observers
    before, _fault_hook = _fault_hook, hook
    try:
        yield
    finally:
        _fault_hook = before


@dataclass(slots=True)
class _Gathering:
    """``operations`` is None after the block: tasks that outlive the block no longer add to it."""

    operations: list[Operation] | None


_gathering: ContextVar[_Gathering | None] = ContextVar("gathering", default=None)


@contextmanager
def gathered_operations() -> Iterator[list[Operation]]:
    """The operations that begin during the block, in this task and in tasks that it starts."""
    operations: list[Operation] = []
    gathering = _Gathering(operations)
    _gathering.set(gathering)
    try:
        yield operations
    finally:
        gathering.operations = None


def failed_operations() -> list[Operation]:
    """The last operations with a failed or cancelled stage, oldest first. Their objects may no longer exist."""
    return list(_failed)


def open_stages() -> list[tuple[Operation, Stage]]:
    """The stages that are running now, in the order of their starts. Any thread may call this."""
    return list(_open.values())
