"""The agent's ends of a process's standard streams: pipes, or the master of a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import termios
from collections.abc import Iterator
from typing import Self

from cri.streaming.httpstream.descriptors import prepare


class ProcessIO:
    """Owns the descriptors; a stream that was not asked for is None. ``close`` closes what is still open, once."""

    def __init__(self, *, stdin: int | None = None, stdout: int | None = None, stderr: int | None = None) -> None:
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr
        self.is_terminal = False
        for descriptor in self._descriptors():
            prepare(descriptor)

    @classmethod
    def terminal(cls, master: int, *, stdin: bool = True) -> Self:
        """The streams of a process on a terminal: both directions through the master, no stderr."""
        streams = cls(stdin=master if stdin else None, stdout=master)
        streams.is_terminal = True
        return streams

    def end_input(self) -> None:
        """No more input: close the pipe; on a terminal that edits lines, type its end-of-file character."""
        if self.stdin is None:
            return
        if not self.is_terminal:
            os.close(self.stdin)
        else:
            with contextlib.suppress(OSError, termios.error):
                attributes = termios.tcgetattr(self.stdin)
                if attributes[3] & termios.ICANON:
                    os.write(self.stdin, attributes[6][termios.VEOF])
        self.stdin = None

    def end_output(self, descriptor: int) -> None:
        """Stop reading this output: a process that writes to its pipe gets an error."""
        if self.is_terminal:
            return
        if descriptor == self.stdout:
            self.stdout = None
        elif descriptor == self.stderr:
            self.stderr = None
        else:
            return
        os.close(descriptor)

    def resize(self, width: int, height: int) -> None:
        """Set the terminal's size in characters; nothing without a terminal."""
        if self.is_terminal and self.stdout is not None:
            fcntl.ioctl(self.stdout, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def close(self) -> None:
        """Close what is open; again is harmless."""
        descriptors = self._descriptors()
        self.stdin = self.stdout = self.stderr = None
        for descriptor in descriptors:
            os.close(descriptor)

    def _descriptors(self) -> set[int]:
        return {descriptor for descriptor in (self.stdin, self.stdout, self.stderr) if descriptor is not None}


@contextlib.contextmanager
def open_pipes(*, stdin: bool, stdout: bool, stderr: bool) -> Iterator[tuple[ProcessIO, dict[int, int]]]:
    """Pipes for the streams asked for: our ends, and the child's by descriptor number, for ``host.processes.spawn``.

    The child's ends are closed at the end of the block (start the child in it), ours too if it fails.
    """
    with contextlib.ExitStack() as child_ends, contextlib.ExitStack() as undo:
        ours: dict[str, int] = {}
        child: dict[int, int] = {}
        for number, name, wanted in ((0, "stdin", stdin), (1, "stdout", stdout), (2, "stderr", stderr)):
            if not wanted:
                continue
            read_end, write_end = os.pipe2(os.O_CLOEXEC)
            ours[name], child[number] = (write_end, read_end) if number == 0 else (read_end, write_end)
            child_ends.callback(os.close, child[number])
            undo.callback(os.close, ours[name])
        streams = ProcessIO(**ours)
        undo.pop_all()
        undo.callback(streams.close)
        yield streams, child
        undo.pop_all()
