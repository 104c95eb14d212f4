"""Delaying a command at its execve until the OCI runtime has set the size of its terminal (fanotify(7)).

crun starts the command and sets the size next. If crun is preempted in between, the command sees a terminal without a
size. crun passes the terminal to the agent after that. So the kernel asks the agent whether a program of the
container's root file system may be executed, and the agent answers for crun's child when the terminal arrives.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import struct
import time
from pathlib import Path

from host.concurrency.threads import in_fresh_thread
from host.errors import LimitError
from host.files import procfs

_FAN_CLOEXEC, _FAN_NONBLOCK, _FAN_CLASS_CONTENT = 0x1, 0x2, 0x4
_FAN_MARK_ADD, _FAN_MARK_FILESYSTEM = 0x1, 0x100
_FAN_OPEN_EXEC_PERM = 0x40000
_FAN_ALLOW = 1
_AT_FDCWD = -100
_LARGE_FILES = 0o100000  # O_LARGEFILE, which os has as 0; without it, what has 2 GiB and more is not executed
_EVENT = struct.Struct("=IBBHQii")  # length, version, reserved, length of this part, mask, descriptor, pid
_ANSWER = struct.Struct("=iI")
_MAX_SECONDS = 10.0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fanotify_mark.argtypes = (ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p)


class ExecGate:
    """Asks about programs executed from the root file system ``rootfs``, until ``hold`` is over or ``close``.

    ``rootfs`` is where the agent has mounted it, not the root of a process: that may be one of the node's folders, or a
    volume whose server does not answer. If the kernel does not support this, nothing is delayed. Processes that wait
    when the agent dies continue.
    """

    def __init__(self, rootfs: Path) -> None:
        self._group = -1
        with contextlib.suppress(OSError):
            if rootfs.stat().st_dev != rootfs.parent.stat().st_dev:  # else nothing is mounted there
                self._group = _watch(rootfs)

    async def hold(self, runtime: int, word: str, socket: int) -> None:
        """Allow all processes to continue at once, but those of an OCI runtime once ``socket`` is readable or the
        runtime's first process ``runtime`` has ended; ``word`` is in the command line of this runtime alone.
        """
        if self._group < 0:
            return
        with contextlib.ExitStack() as files:
            files.callback(os.close, self._group)  # the kernel allows all waiting processes to continue
            group, self._group = self._group, -1
            with contextlib.suppress(OSError, LimitError):  # no descriptor or no thread is left: nothing is delayed
                socket = os.dup(socket)
                files.callback(os.close, socket)
                # The command must not wait for the loop, and a thread answers sooner.
                await in_fresh_thread(_answer, files, group, runtime, os.fsencode(word), socket)

    def close(self) -> None:
        """Allow all processes to continue, unless ``hold`` does that. Repeatable."""
        if self._group >= 0:
            group, self._group = self._group, -1
            os.close(group)


def _watch(rootfs: Path) -> int:
    files = os.O_RDONLY | os.O_CLOEXEC | _LARGE_FILES
    group = int(_libc.fanotify_init(_FAN_CLASS_CONTENT | _FAN_CLOEXEC | _FAN_NONBLOCK, files))
    if group < 0:
        raise OSError(ctypes.get_errno(), "fanotify_init")
    flags = _FAN_MARK_ADD | _FAN_MARK_FILESYSTEM
    if _libc.fanotify_mark(group, flags, _FAN_OPEN_EXEC_PERM, _AT_FDCWD, os.fsencode(rootfs)) < 0:
        os.close(group)
        raise OSError(ctypes.get_errno(), "fanotify_mark")
    return group


def _answer(files: contextlib.ExitStack, group: int, runtime: int, word: bytes, socket: int) -> None:
    """Answer until ``hold`` is over, and close ``files``: ``group`` and ``socket`` are among them."""
    deadline = time.monotonic() + _MAX_SECONDS
    with files as stack:
        with contextlib.suppress(OSError):
            ended = os.pidfd_open(runtime)
            stack.callback(os.close, ended)
            held: list[int] = []  # an answer names the descriptor, so no other event may get the same number
            stack.callback(_close_all, held)
            poller = select.poll()
            for descriptor in (group, socket, ended):
                poller.register(descriptor, select.POLLIN)
            while (left := deadline - time.monotonic()) > 0:
                ready = {descriptor for descriptor, _ in poller.poll(left * 1000)}
                if ready != {group}:
                    return
                held += _answer_events(group, word)


def _close_all(files: list[int]) -> None:
    for file in files:
        os.close(file)


def _answer_events(group: int, word: bytes) -> list[int]:
    """Allow all processes to continue but those with ``word`` in their command line, whose descriptors are returned.

    Their parents do not identify them: crun starts the command from a child that ends, so the agent adopts it.
    """
    events, offset, held = os.read(group, 4096), 0, []
    while offset < len(events):
        length, _, _, _, _, file, pid = _EVENT.unpack_from(events, offset)
        offset += length
        if word in procfs.command_line(pid):
            held.append(file)
        else:
            os.write(group, _ANSWER.pack(file, _FAN_ALLOW))
            os.close(file)
    return held
