"""The second process of an unpack worker: it makes batches of small new files while the first one reads on.

Both are confined in the same way. They share memory with a few segments, each for one batch. One pipe carries the sizes
of batches, the other says which files of a batch could not be made. Batches are made in the order in which they are
sent.
"""

from __future__ import annotations

import marshal
import mmap
import os
import struct

from images.unpack.tar.headers import LimitError
from images.unpack.writing.small_file import failed_files

TYPE_CHECKING = False  # as type checkers know it, without importing typing
if TYPE_CHECKING:
    from images.unpack.writing.small_file import SmallFile

MAX_FILES = 64  # of a batch: an answer has one bit for each
MAX_BYTES = 192 << 10  # of a batch that takes one more file
MAX_FILE_BYTES = 32 << 10  # copying larger ones would take longer than making them
_SEGMENTS = 4
_SEGMENT_BYTES = 256 << 10  # of a full batch, with names and what marshal adds
_ANSWERS_AT = _SEGMENTS * _SEGMENT_BYTES  # a byte behind the segments that counts answers
_SENT = struct.Struct("=I")
_ANSWER = struct.Struct("=Q")
_MARSHAL_VERSION = 2  # later ones look for objects that occur twice, which takes time


class HelperProcess:
    """``fork`` starts it. ``serve`` is called in the new process, all else in the one that started it."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _ANSWERS_AT + 1)
        self._pid = self._send_to = self._receive_from = -1
        self._sent: list[list[SmallFile]] = []  # batches without an answer, oldest first
        self._answered = 0

    def fork(self) -> bool:
        """Start the process; True in the new one. Raises OSError."""
        sizes, sizes_end = os.pipe2(os.O_CLOEXEC)
        answers, answers_end = os.pipe2(os.O_CLOEXEC)
        self._pid = os.fork()
        forked = self._pid == 0
        for descriptor in (0, 1, sizes_end, answers) if forked else (sizes, answers_end):
            os.close(descriptor)
        self._receive_from, self._send_to = (sizes, answers_end) if forked else (answers, sizes_end)
        return forked

    def serve(self) -> None:
        """Make the files of each batch that is sent, until the other process ends. Raises OSError."""
        view = memoryview(self._memory)
        while sent := os.read(self._receive_from, _SENT.size):
            begin = self._answered % _SEGMENTS * _SEGMENT_BYTES
            batch = marshal.loads(view[begin : begin + _SENT.unpack(sent)[0]])
            failed = sum(1 << place for place in failed_files(batch))
            os.write(self._send_to, _ANSWER.pack(failed))
            self._answered += 1
            self._memory[_ANSWERS_AT] = self._answered & 0xFF

    def send(self, batch: list[SmallFile]) -> bool:
        """Have the process make these files; False, and nothing is done, if it has enough to do.

        Raises LimitError if it was killed.
        """
        if len(self._sent) == _SEGMENTS:
            return False
        begin = (self._answered + len(self._sent)) % _SEGMENTS * _SEGMENT_BYTES
        data = marshal.dumps(batch, _MARSHAL_VERSION)
        self._memory[begin : begin + len(data)] = data
        try:
            os.write(self._send_to, _SENT.pack(len(data)))
        except BrokenPipeError:
            raise _killed() from None
        self._sent.append(batch)
        return True

    def answer(self, *, wait: bool) -> tuple[list[SmallFile], list[int]] | None:
        """The oldest batch without an answer, and the places in it of the files that could not be made.

        None if there is no such batch, or if it is not done yet and this shall not ``wait``. Raises LimitError if the
        process was killed.
        """
        if not self._sent or not (wait or self._memory[_ANSWERS_AT] != self._answered & 0xFF):
            return None
        data = os.read(self._receive_from, _ANSWER.size)
        if not data:
            raise _killed()
        self._answered += 1
        batch = self._sent.pop(0)
        (failed,) = _ANSWER.unpack(data)
        return batch, [place for place in range(len(batch)) if failed >> place & 1] if failed else []

    def end(self) -> None:
        """End the process, so that its time counts as that of this one."""
        os.close(self._send_to)
        os.waitpid(self._pid, 0)


def _killed() -> LimitError:
    return LimitError("the process that makes its small files was killed: the node may be short of memory")
