"""The user's terminal: in raw mode while a remote terminal is shown on it, and always restored."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import termios
import tty
from collections.abc import Callable, Iterator

# Signals that end this process. asyncio handles SIGINT.
_ENDINGS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def is_terminal(descriptor: int) -> bool:
    """Whether the descriptor is a terminal; False for a closed one."""
    with contextlib.suppress(OSError):
        return os.isatty(descriptor)
    return False


def size() -> os.terminal_size | None:
    """Columns and lines of the terminal on one of our standard streams; None if there is none."""
    for descriptor in (0, 1, 2):
        with contextlib.suppress(OSError):
            return os.get_terminal_size(descriptor)
    return None


class EndedBySignalError(Exception):
    """A signal asked us to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def endings_caught() -> Iterator[None]:
    """Have signals that would end us cancel the current task, so that everything is restored; then
    EndedBySignalError.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    caught: list[int] = []

    def end(number: int) -> None:
        caught.append(number)
        task.cancel()

    for number in _ENDINGS:
        loop.add_signal_handler(number, end, number)
    try:
        yield
    except asyncio.CancelledError:
        if caught:
            task.uncancel()
            raise EndedBySignalError(caught[0]) from None
        raise
    finally:
        for number in _ENDINGS:
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def raw(descriptor: int, on_resize: Callable[[], None]) -> Iterator[None]:
    """Pass every key on unchanged until the block ends; ``on_resize`` is called when there may be a new size."""
    loop = asyncio.get_running_loop()
    before = termios.tcgetattr(descriptor)

    def resume() -> None:
        # While this process was stopped, the shell set its own terminal modes.
        tty.setraw(descriptor)
        on_resize()

    try:
        tty.setraw(descriptor, termios.TCSADRAIN)
        loop.add_signal_handler(signal.SIGWINCH, on_resize)
        loop.add_signal_handler(signal.SIGCONT, resume)
        yield
    finally:
        for number in (signal.SIGWINCH, signal.SIGCONT):
            loop.remove_signal_handler(number)
        with contextlib.suppress(termios.error):  # the terminal may be gone by now
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
