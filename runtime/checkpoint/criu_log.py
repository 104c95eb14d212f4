"""Finds the reason of a failed checkpoint or restore in CRIU's log, and explains it."""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from pathlib import Path

_log = logging.getLogger("podkeel.checkpoint")

_MAX_LOG_BYTES = 64 << 20  # only the end of a larger one is read
_MAX_LINE_LENGTH = 300
_MAX_LINES = 3
_ERROR = re.compile(r"^\(\d+\.\d+\)\s+(?:(\d+): )?Error \([^)]*\): (.*)$")
_TASK = re.compile(r"^\(\d+\.\d+\) (?:Dumping task|Dumping processes) \(pid: (\d+) comm: (.*)\)$")
_DESCRIPTOR = re.compile(r"^\(\d+\.\d+\) \d+ fdinfo (\d+): ")
_PATH = re.compile(r"^\(\d+\.\d+\) Dumping path for -?\d+ fd via self \d+ \[(.*)\]$")
_AFTER_FILES = re.compile(r"^\(\d+\.\d+\) (?:Dumping pages|Dumping core|Dumping opened files)\b")
# Errors that only repeat that CRIU failed, and messages that are no errors.
_NO_REASON = re.compile(
    r"rlimit: Can't setup RLIMIT_NOFILE|^exited, status=|^Dumping FAILED|^Restoring FAILED|^Dump .* failed with"
    r"|^Pre-dumping FAILED|cgroupd: recv req error|Unable to (connect to transport|wait for)"
)
# CRIU's messages, and what a person can do about each. The first match is used.
_MEANINGS = (
    (
        r"(?:Found|Task|process).*(?:traced|ptrace)|tracer|is already traced",
        "one of its processes is being traced: end the debugger",
    ),
    (r"Connected TCP|tcp-established|established TCP", "it has an open TCP connection"),
    (
        r"Can't dump ghost file|ghost file .* (?:too big|limit)|ghost-limit",
        "a process has a large deleted file open",
    ),
    (
        r"sockets: Can't get 1:(?:16|34) opt: Operation not supported",
        "it has a TCP or UDP socket, and CRIU before 4.2 cannot save one on Linux 6.16 or later: update CRIU",
    ),
    (
        r"[Cc]an't get rlimit .*not permitted",
        "the agent lacks CAP_SYS_RESOURCE, which it needs for containers with users other than root",
    ),
    (
        r"link-remap|Can't create link remap",
        "a process has a file open whose name was removed, and which has another name: close it",
    ),
    (r"io_uring|anon_inode:\[io_uring\]", "a process uses io_uring, which cannot be saved: turn it off"),
    (
        r"(?:chr|blk|char|block)dev|Can't dump file .* of that type|device .* not supported|Unknown device",
        "a process has a device open that cannot be saved: close it",
    ),
    (r"(?:unix|External).*socket|ext-unix-sk", "a process has a unix socket open that leads out of the container"),
    (r"inotify|fanotify|irmap", "a process watches a file that cannot be found again"),
    (r"perf_event|bpf", "a process uses perf or BPF, which cannot be saved"),
    (
        r"doesn't have a proper root mount|Mount .* unreachable|Can't lookup mount|mnt:.*(?:unsupported|not supported)",
        "it has a mount that cannot be saved",
    ),
    (r"No space left on device", "the disk is full: free some space"),
    (r"File too large", "the checkpoint was cancelled"),
    (r"AIO|aio", "a process waits for asynchronous input or output"),
    (r"VDSO|vdso|cpu.*(?:feature|capab)|x86_family|FPU", "it was checkpointed on another kind of processor"),
    (
        r"pid \d+ .*(?:exists|busy)|Unable to .*(?:fork|clone).*pid|Can't fork for \d+",
        "a process id that it needs is taken in its PID namespace",
    ),
    (r"File .* has bad (?:size|mode)|file .* (?:size|mode) mismatch", "a file that it has open has changed"),
    (r"Can't open file .*(?:No such file)?", "a file that it has open is missing"),
)


def reason(log: Path) -> str:
    """Why CRIU failed: the cause if its log shows it, CRIU's own message, and the process and the file it was saving.

    Empty if the log has no error. Pids are the node's after a failed checkpoint, the container's after a failed
    restore.
    """
    complaints, place = _complaints(log)
    if not complaints:
        return ""
    text = "; ".join(complaints)
    meaning = next((meaning for pattern, meaning in _MEANINGS if re.search(pattern, text)), "")
    explanation = f"{meaning} (CRIU: {text})" if meaning else f"CRIU: {text}"
    return f"{explanation}: {place}" if place else explanation


def _complaints(log: Path) -> tuple[list[str], str]:
    """The first errors of the log that have a reason, and where CRIU was. Later errors are their consequences."""
    found: list[str] = []
    place, at = "", _Place()
    for line in _lines(log):
        match = _ERROR.match(line)
        if match is None:
            if not found:
                at.read(line)
            continue
        if not _NO_REASON.search(match[2]):
            words = _printable(match[2].strip())
            if words and not found:
                place = at.text(match[1])
            if words and words not in found:
                found.append(words[:_MAX_LINE_LENGTH])
            if len(found) == _MAX_LINES:
                break
    return found, place


class _Place:
    """The object that CRIU was saving when it failed. Its log has lines for each task, descriptor and path."""

    def __init__(self) -> None:
        self._task = self._descriptor = self._path = ""

    def read(self, line: str) -> None:
        if match := _TASK.search(line):
            self._task, self._descriptor, self._path = f"process {match[1]} ({_printable(match[2])})", "", ""
        elif match := _DESCRIPTOR.search(line):
            self._descriptor, self._path = f"descriptor {match[1]}", ""
        elif match := _PATH.search(line):
            self._path = _printable(match[1])
        elif _AFTER_FILES.search(line):
            self._descriptor = self._path = ""

    def text(self, restored: str | None) -> str:
        """The place as text. ``restored`` is the pid in the line, if a process was being restored."""
        if restored is not None:
            return f"process {restored} of the checkpoint"
        return ", ".join(filter(None, (self._task, self._descriptor, self._path)))


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text[:_MAX_LINE_LENGTH])


def _lines(log: Path) -> list[str]:
    try:
        with log.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _MAX_LOG_BYTES))
            return file.read(_MAX_LOG_BYTES).decode(errors="replace").splitlines()
    except OSError:
        return []


def keep(log: Path, folder: str, name: str) -> str:
    """Keep a copy of CRIU's log in the configured ``folder``, if it is set. Returns a text about it for the error.

    Blocks.
    """
    if not folder:
        return ""
    kept = Path(folder) / f"{name}-{time.time_ns()}-{log.name}"
    try:
        kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(kept, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with log.open("rb") as source, os.fdopen(descriptor, "wb") as file:
            shutil.copyfileobj(source, file)
    except OSError as error:
        _log.warning("checkpoint: CRIU's log: cannot be kept: %s", error)
        return ""
    return f"; its log is {kept}"
