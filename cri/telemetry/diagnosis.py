"""A diagnosis of the agent: stacks of threads and tasks, open stages, pools and descriptors, but no values.

SIGQUIT writes it to standard error, also while the event loop hangs: the stacks of threads come from faulthandler,
which needs no Python code to run.
"""

from __future__ import annotations

import asyncio
import faulthandler
import itertools
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import FrameType
from typing import Any

from cri.version import VERSION
from host.concurrency.thread_starting import start_thread
from host.concurrency.threads import pool_use
from host.errors import printable
from host.files import descriptors
from host.stages import open_stages

MAX_BYTES = 4 << 20
_MAX_TASKS = 2000
_MAX_FRAMES = 30
_MAX_STAGES = 2000

_log = logging.getLogger("podkeel.diagnosis")


def write_on_signal(loop: asyncio.AbstractEventLoop) -> None:
    """Have SIGQUIT write a diagnosis to standard error. For the main thread."""

    def write() -> None:
        sys.stderr.write(f"{diagnosis(loop)}\nend of the diagnosis\n")
        sys.stderr.flush()

    def handle(_number: int, _frame: FrameType | None) -> None:
        start_thread(write, name="diagnosis", failed=lambda error: _log.warning("diagnosis: not written: %s", error))

    signal.signal(signal.SIGQUIT, handle)
    with suppress(OSError, ValueError):  # standard error is no file
        faulthandler.register(signal.SIGQUIT, file=sys.stderr, all_threads=True, chain=True)
        faulthandler.enable(file=sys.stderr)  # also for SIGABRT, by which systemd's watchdog ends a service


def diagnosis(loop: asyncio.AbstractEventLoop) -> str:
    """The whole text, of at most ``MAX_BYTES``. Blocks for some milliseconds: for a thread."""
    parts = itertools.chain(_process(), _stages(), _pools(), _descriptors(), _threads(), _tasks(loop))
    text = printable("\n".join(parts))
    cut = text.encode()[:MAX_BYTES].decode(errors="ignore")
    return cut if cut == text else f"{cut}\n… cut off after {MAX_BYTES} bytes"


def _process() -> Iterator[str]:
    yield f"== podkeel {VERSION}, pid {os.getpid()}, {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}"
    with open("/proc/self/status", encoding="utf-8") as status:
        wanted = ("VmRSS", "VmHWM", "Threads", "FDSize")
        yield ", ".join(" ".join(line.split()) for line in status if line.startswith(wanted))


def _stages() -> Iterator[str]:
    stages = open_stages()
    yield f"\n== open stages: {len(stages)}"
    for operation, stage in stages[:_MAX_STAGES]:
        seconds = (time.time_ns() - stage.started) / 1e9
        yield f"{operation.name} {operation.subject}: {stage.name}: for {seconds:.3f} s"


def _pools() -> Iterator[str]:
    yield "\n== pools of threads"
    for purpose, (asked, most) in pool_use().items():
        yield f"{purpose}: {asked} pieces of work, {max(0, asked - most)} of them wait; threads: at most {most}"


def _descriptors() -> Iterator[str]:
    kinds: Counter[str] = Counter()
    names = os.listdir(descriptors.FOLDER)  # noqa: PTH208 - of thousands
    for name in names:
        with suppress(OSError):
            kinds[_kind(str((descriptors.FOLDER / name).readlink()))] += 1
    yield f"\n== descriptors: {len(names)} of {descriptors.limit()}"
    yield from (f"{kind}: {count}" for kind, count in kinds.most_common())


def _kind(target: str) -> str:
    """``socket``, ``pipe``, ``anon_inode:[eventfd]``, or the folder two levels below the root that a file is in."""
    if not target.startswith("/"):
        return target if target.startswith("anon_inode") else target.partition(":")[0]
    return "/".join(target.split("/")[:4])


def _threads() -> Iterator[str]:
    frames = sys._current_frames()  # noqa: SLF001 - the documented way to another thread's stack
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    yield f"\n== threads: {len(frames)}"
    for ident, frame in frames.items():
        yield f"-- {names.get(ident, 'of a library')} ({ident})"
        yield from _shown(traceback.extract_stack(frame, _MAX_FRAMES))


def _tasks(loop: asyncio.AbstractEventLoop) -> Iterator[str]:
    try:
        tasks = sorted(asyncio.all_tasks(loop), key=lambda task: task.get_name())
    except RuntimeError as error:  # asyncio.all_tasks gave up, because the loop made and ended tasks meanwhile
        yield f"\n== tasks: unknown: {error}"
        return
    yield f"\n== tasks: {len(tasks)}"
    for task in tasks[:_MAX_TASKS]:
        yield f"-- {task.get_name()}: {getattr(task.get_coro(), '__qualname__', '?')}"
        yield from _shown(traceback.StackSummary.extract(_frames(task.get_coro())))


def _frames(coroutine: Any) -> Iterator[tuple[FrameType, int]]:
    """The frames of a suspended coroutine, from its outermost call to the one that waits."""
    for _ in range(_MAX_FRAMES):
        frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "gi_frame", None)
        frame = frame or getattr(coroutine, "ag_frame", None)
        if frame is None:
            return
        yield frame, frame.f_lineno
        waited = getattr(coroutine, "cr_await", None) or getattr(coroutine, "gi_yieldfrom", None)
        coroutine = waited or getattr(coroutine, "ag_await", None)


def _shown(stack: Iterable[traceback.FrameSummary]) -> Iterator[str]:
    return (f"   {frame.filename}:{frame.lineno} {frame.name}" for frame in stack)
