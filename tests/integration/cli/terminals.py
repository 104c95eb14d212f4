"""A person at a terminal."""

from __future__ import annotations

import os
import select
import subprocess
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Start = Callable[..., "subprocess.Popen[bytes]"]


@contextmanager
def starting(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[Start]:
    """Starts a program with further words, behind a ``prefix``; what still runs after the block is killed."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*words: str, prefix: tuple[str, ...] = (), **streams: Any) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([*prefix, *command, *words], env=environment, **streams))
        return started[-1]

    try:
        yield start
    finally:
        for process in started:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


class Terminal:
    """A terminal with a program in its foreground; we are the person."""

    def __init__(self, start: Start, *words: str, lines: int = 24, columns: int = 80) -> None:
        self._master, self.slave = os.openpty()
        self.resize(lines, columns)
        self.before = termios.tcgetattr(self.slave)
        streams = {"stdin": self.slave, "stdout": self.slave, "stderr": self.slave}
        self.process = start(*words, prefix=("setsid", "--ctty", "--wait"), **streams)
        self.shown = b""

    def resize(self, lines: int, columns: int) -> None:
        termios.tcsetwinsize(self._master, (lines, columns))

    def type(self, text: bytes) -> None:
        os.write(self._master, text)

    def wait_for(self, text: bytes, seconds: float = 15, after: bytes = b"") -> None:
        """Until ``text`` is shown, if need be after something else."""
        deadline = time.monotonic() + seconds
        while text not in self.shown.rpartition(after)[2] if after else text not in self.shown:
            ready, _, _ = select.select([self._master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come, only {self.shown!r}"
            self.shown += os.read(self._master, 65536)

    def pid(self) -> int:
        """Of podkeel itself, which setsid started."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0]) if children else self.process.pid

    @property
    def is_raw(self) -> bool:
        return not termios.tcgetattr(self.slave)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)

    def ended(self) -> int:
        """The exit status; the terminal must be as it was."""
        deadline = time.monotonic() + 15
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"it did not end: {self.shown!r}"
            ready, _, _ = select.select([self._master], [], [], 0.05)
            if ready:
                self.shown += os.read(self._master, 65536)
        assert termios.tcgetattr(self.slave) == self.before
        return int(self.process.returncode)

    def close(self) -> None:
        os.close(self._master)
        os.close(self.slave)
