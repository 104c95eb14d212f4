"""CRIU's log: which of its lines says why a checkpoint failed, and what that means for the container."""

from __future__ import annotations

import os
import re
from pathlib import Path

_LARGEST_LOG = 64 << 20  # only the end of a larger one is read
_LONGEST_LINE = 300
_MOST_LINES = 3
_ERROR = re.compile(r"^\(\d+\.\d+\)\s+(?:\d+: )?Error \([^)]*\): (.*)$")
# Messages of CRIU without an error, and those that only repeat that it failed.
_NO_REASON = re.compile(
    r"rlimit: Can't setup RLIMIT_NOFILE|^exited, status=|^Dumping FAILED|^Restoring FAILED|^Dump .* failed with"
    r"|^Pre-dumping FAILED|cgroupd: recv req error|Unable to (connect to transport|wait for)"
)
# Messages of CRIU, and what a person can do about them. The first that matches counts.
_MEANINGS = (
    (
        r"(?:Found|Task|process).*(?:traced|ptrace)|tracer|is already traced",
        "a process of it is being traced: end the debugger",
    ),
    (r"Connected TCP|tcp-established|established TCP", "it has an open TCP connection"),
    (
        r"Can't dump ghost file|ghost file .* (?:too big|limit)|ghost-limit",
        "a process has a large file open that was deleted",
    ),
    (
        r"[Cc]an't get rlimit .*not permitted",
        "the agent has not CAP_SYS_RESOURCE, which containers of other users than root take",
    ),
    (
        r"link-remap|Can't create link remap",
        "a process has a file open whose name was removed, and which has another name: close it",
    ),
    (
        r"(?:chr|blk|char|block)dev|Can't dump file .* of that type|device .* not supported|Unknown device",
        "a process has a device open that cannot be saved: close it",
    ),
    (r"(?:unix|External).*socket|ext-unix-sk", "a process has a unix socket open that leads out of the container"),
    (r"inotify|fanotify|irmap", "a process watches a file that cannot be found again"),
    (r"io_uring|anon_inode:\[io_uring\]", "a process uses io_uring, which cannot be saved: turn it off"),
    (r"perf_event|bpf", "a process uses perf or BPF, which cannot be saved"),
    (
        r"doesn't have a proper root mount|Mount .* unreachable|Can't lookup mount|mnt:.*(?:unsupported|not supported)",
        "it has a mount that cannot be saved",
    ),
    (r"No space left on device", "the disk is full: free some space"),
    (r"File too large", "the checkpoint was given up"),
    (r"AIO|aio", "a process waits for asynchronous input or output"),
    (r"VDSO|vdso|cpu.*(?:feature|capab)|x86_family|FPU", "it was checkpointed on another kind of processor"),
    (
        r"pid \d+ .*(?:exists|busy)|Unable to .*(?:fork|clone).*pid|Can't fork for \d+",
        "a process id that it needs is taken in its PID namespace",
    ),
    (r"File .* has bad (?:size|mode)|file .* (?:size|mode) mismatch", "a file that it has open is not what it was"),
    (r"Can't open file .*(?:No such file)?", "a file that it has open is gone"),
)


def reason(log: Path) -> str:
    """Why CRIU failed: the cause, if its log shows it, and CRIU's own message; empty if there is none."""
    complaints = _complaints(log)
    if not complaints:
        return ""
    text = "; ".join(complaints)
    meaning = next((meaning for pattern, meaning in _MEANINGS if re.search(pattern, text)), "")
    return f"{meaning} (CRIU: {text})" if meaning else f"CRIU: {text}"


def _complaints(log: Path) -> list[str]:
    """The first errors of the log that give a reason: what follows them are their consequences."""
    found: list[str] = []
    for line in _lines(log):
        match = _ERROR.match(line)
        if match is not None and not _NO_REASON.search(match[1]):
            words = "".join(letter if letter.isprintable() else "?" for letter in match[1].strip())
            if words and words not in found:
                found.append(words[:_LONGEST_LINE])
            if len(found) == _MOST_LINES:
                break
    return found


def _lines(log: Path) -> list[str]:
    try:
        with log.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _LARGEST_LOG))
            return file.read(_LARGEST_LOG).decode(errors="replace").splitlines()
    except OSError:
        return []
