"""The line of CRIU's log that errors quote, and its explanation."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.checkpoint.criu_log import keep, reason

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
         "a process has a large deleted file open"),
        ("(00.1) Error (criu/sk-inet.c:191): inet: Connected TCP socket, consider using --tcp-established option.",
         "it has an open TCP connection"),
        ("(00.1) Error (criu/ptrace.c:88): Unable to ptrace, 31 is already traced", "is being traced"),
        ("(00.1) Error (criu/restore.c:9):    17: Error (criu/files.c:1): x", "CRIU: "),
        ("(00.123)     17: Error (criu/files-reg.c:2103): Can't open file etc/gone: No such file or directory",
         "a file that it has open is missing"),
        ("(00.1) Error (criu/image.c:1): Can't write: No space left on device", "the disk is full"),
    ],
)  # fmt: skip
def test_the_reason_is_reported_with_criu_s_own_words(tmp_path: Path, line: str, words: str) -> None:
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


PROGRESS = """\
(00.001141) Dumping processes (pid: 304 comm: sh)
(00.065879) Dumping task (pid: 304 comm: sh)
(00.066086) Dumping path for -3 fd via self 13 [/bin/busybox]
(00.091001) Dumping opened files (pid: 304)
(00.091089) 304 fdinfo 0: pos:                0 flags:           100002/0
(00.091120) Dumping path for 0 fd via self 16 [/dev/null]
(00.091524) Dumping pages (type: 59 pid: 304)
(00.096539) Dumping task (pid: 307 comm: java (main))
(00.096632) Dumping opened files (pid: 307)
(00.096711) 307 fdinfo 0: pos:                0 flags:           100002/0
(00.096720) Dumping path for 0 fd via self 16 [/dev/null]
(00.096784) 307 fdinfo 7: pos:                0 flags:                1/0
"""


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("(00.1) Dumping path for 7 fd via self 19 [/data/\x1bgone]\n(00.2) Error (criu/x.c:9): Can't dump ghost file",
         "(CRIU: Can't dump ghost file): process 307 (java (main)), descriptor 7, /data/?gone"),
        ("(00.2) Error (criu/files-ext.c:95): Can't dump file 7 of that type [20660] (chrdev 10:237)",
         "close it (CRIU: Can't dump file 7 of that type [20660] (chrdev 10:237)): process 307 (java (main)), desc"),
        ("(00.1) Dumping pages (type: 59 pid: 307)\n(00.2) Error (criu/mem.c:9): Can't dump aio ring",
         "(CRIU: Can't dump aio ring): process 307 (java (main))"),
        ("(00.2)     17: Error (criu/files-reg.c:2103): Can't open file etc/gone: No such file or directory",
         "(CRIU: Can't open file etc/gone: No such file or directory): process 17 of the checkpoint"),
        ("(00.2) Error (criu/sockets.c:628): sockets: Can't get 1:16 opt: Operation not supported",
         "CRIU before 4.2 cannot save one on Linux 6.16 or later: update CRIU"),
        ("(00.2) Error (criu/files-ext.c:95): Can't dump file 7 of that type [600] (unknown anon_inode:[io_uring])",
         "a process uses io_uring"),
    ],
)  # fmt: skip
def test_the_process_and_what_it_has_open_are_named(tmp_path: Path, lines: str, words: str) -> None:
    log = tmp_path / "dump.log"
    log.write_text(
        PROGRESS + lines + "\n(00.3) Error (criu/cr-dump.c:1681): Dump files (pid: 307) failed with -1\n" + END
    )
    told = reason(log)
    assert words in told
    assert told.count("process 304") == 0


def test_a_log_is_kept_on_request(tmp_path: Path) -> None:
    log = tmp_path / "restore.log"
    log.write_text("it")
    assert keep(log, "", "name") == ""
    told = keep(log, str(tmp_path / "kept"), "name")
    (kept,) = (tmp_path / "kept").iterdir()
    assert told == f"; its log is {kept}"
    assert kept.read_text() == "it"
    assert (kept.stat().st_mode & 0o7777, kept.parent.stat().st_mode & 0o7777) == (0o600, 0o700)
    assert keep(tmp_path / "missing.log", str(tmp_path / "kept"), "name") == ""
