"""The line of CRIU's log that errors quote, and its explanation."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.checkpoint.criu_log import reason

BEGIN = """\
(00.000000) Version: 4.1.1 (gitid 0)
(00.000114) Error (criu/util.c:1533): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted
(00.028000) Dumping 17 (pid: 258)
"""
END = "(00.200000) Error (criu/cr-dump.c:2128): Dumping FAILED.\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("(00.1) Error (criu/files-reg.c:1039): Can't dump ghost file /large of 83886080 size, increase limit",
         "a process has a large file open that was deleted"),
        ("(00.1) Error (criu/sk-inet.c:191): inet: Connected TCP socket, consider using --tcp-established option.",
         "it has an open TCP connection"),
        ("(00.1) Error (criu/ptrace.c:88): Unable to ptrace, 31 is already traced", "is being traced"),
        ("(00.1) Error (criu/restore.c:9):    17: Error (criu/files.c:1): x", "CRIU: "),
        ("(00.123)     17: Error (criu/files-reg.c:2103): Can't open file etc/gone: No such file or directory",
         "a file that it has open is gone"),
        ("(00.1) Error (criu/image.c:1): Can't write: No space left on device", "the disk is full"),
    ],
)  # fmt: skip
def test_the_reason_is_told_in_words_and_in_criu_s(tmp_path: Path, line: str, words: str) -> None:
    log = tmp_path / "dump.log"
    log.write_text(BEGIN + line + "\n" + END)
    told = reason(log)
    assert words in told
    assert line.rpartition("): ")[2] in told
    assert "RLIMIT_NOFILE" not in told
    assert "Dumping FAILED" not in told


def test_a_log_without_errors_gives_no_reason(tmp_path: Path) -> None:
    log = tmp_path / "dump.log"
    log.write_text(BEGIN)
    assert reason(log) == ""
    assert reason(tmp_path / "missing.log") == ""


def test_what_processes_are_called_cannot_paint_terminals(tmp_path: Path) -> None:
    log = tmp_path / "dump.log"
    log.write_bytes(b"(00.1) Error (criu/x.c:1): it is \x1b[31m\xff" + b"x" * 10_000 + b"\n")
    told = reason(log)
    assert "\x1b" not in told
    assert len(told) < 400
