"""The agent's log as text: a record differs from what it quotes."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Literal

import pytest

from cri.config.options import LogOptions
from cri.telemetry.logs import configure_logging


def _written(
    capsys: pytest.CaptureFixture[str],
    message: str,
    *,
    error: Exception | None = None,
    style: Literal["text", "json"] = "text",
) -> list[str]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        configure_logging(LogOptions(format=style))
        logging.getLogger("podkeel.calls").warning(message, exc_info=error)
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    return capsys.readouterr().err.split("\n")


def test_what_a_message_quotes_begins_no_record(capsys: pytest.CaptureFixture[str]) -> None:
    forged = "2026-11-22T04:00:00.000Z info    server: all is well"
    first, second, end = _written(capsys, f'CreateContainer: exec "x\n{forged}" not found')
    assert first.endswith('warning calls: CreateContainer: exec "x')
    assert (second, end) == (f'    {forged}" not found', "")


def test_nor_does_what_an_error_quotes(capsys: pytest.CaptureFixture[str]) -> None:
    lines = _written(capsys, "failed", error=ValueError("bad\nand forged"))
    assert lines[-3:] == ["    ValueError: bad", "    and forged", ""]


def test_what_a_message_quotes_commands_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    line, _ = _written(capsys, "a\x1b[2J\x07\rb\x9bc\td é")
    assert line.endswith("a\\x1b[2J\\x07\\x0db\\x9bc\td é")


def test_a_file_s_name_that_is_no_utf8_loses_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    name = b"\xff.txt".decode(errors="surrogateescape")
    line, _ = _written(capsys, f"layer: {name}", error=OSError(5, "Input/output error", name), style="json")
    entry = json.loads(line)
    assert entry["message"] == r"layer: \udcff.txt"
    assert "Input/output error" in entry["exception"]
    line, *_ = _written(capsys, f"layer: {name}")
    assert line.endswith(r"layer: \udcff.txt")


def test_lines_to_the_journal_begin_with_their_priority(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    with (tmp_path / "journal").open("w+") as journal:
        monkeypatch.setattr("sys.stderr", journal)
        found = os.fstat(journal.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        try:
            configure_logging(LogOptions())
            for write in (logging.getLogger("podkeel.a").info, logging.getLogger("podkeel.a").warning):
                write("first\nsecond")
            logging.getLogger("podkeel.a").error("bad", exc_info=ValueError("why"))
        finally:
            root.handlers[:] = handlers
            root.setLevel(level)
        lines = (tmp_path / "journal").read_text().splitlines()
    assert [line[:3] for line in lines] == ["<6>", "<6>", "<4>", "<4>", "<3>", "<3>"]
    assert lines[1] == "<6>    second"


def test_lines_elsewhere_begin_with_their_time(capsys: pytest.CaptureFixture[str]) -> None:
    line, _ = _written(capsys, "told")
    assert line.startswith("20")
