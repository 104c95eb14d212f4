from __future__ import annotations

from pathlib import Path

import pytest

from cli.log_file import LogReader, tail_lines
from host.errors import NotFoundError

TIME = "2026-01-31T12:00:00.123456789Z"


def line(text: str, stream: str = "stdout", tag: str = "F") -> str:
    return f"{TIME} {stream} {tag} {text}\n"


def test_parts_are_joined_per_stream(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    path.write_text(
        line("one ", tag="P") + line("err ", "stderr", "P") + line("two", tag="P") + line("!") + line("or", "stderr")
    )
    with LogReader(path) as reader:
        lines = list(reader.lines())
    assert [(item.stream, item.content) for item in lines] == [("stdout", b"one two!\n"), ("stderr", b"err or\n")]
    assert lines[0].time == TIME
    assert lines[1].text == "err or"


def test_blanks_and_empty_lines_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    path.write_bytes(line("  a  b ").encode() + line("").encode() + f"{TIME} stdout F \xff\n".encode("latin-1"))
    with LogReader(path) as reader:
        assert [item.content for item in reader.lines()] == [b"  a  b \n", b"\n", b"\xff\n"]


def test_a_line_half_written_is_read_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    whole = line("hello")
    with path.open("w") as file, LogReader(path) as reader:
        for end in (10, 40, len(whole) - 1):
            file.seek(0)
            file.write(whole[:end])
            file.flush()
            assert list(reader.lines()) == []
        file.write("\n" + line("again"))
        file.flush()
        assert [item.text for item in reader.lines()] == ["hello", "again"]


def test_reading_continues_in_the_new_file_after_a_rotation(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    path.write_text(line("one"))
    with LogReader(path) as reader:
        assert [item.text for item in reader.lines()] == ["one"]
        with path.open("a") as file:
            file.write(line("two"))
        path.rename(tmp_path / "0.log.1")
        assert [item.text for item in reader.lines()] == ["two"]
        path.write_text(line("three"))
        assert [item.text for item in reader.lines()] == ["three"]


def test_the_end_of_a_container_completes_its_last_line(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    path.write_text(line("one") + line("cut", tag="P"))
    assert [item.content for item in tail_lines(path, 5)] == [b"one\n", b"cut"]
    assert [item.content for item in tail_lines(path, 1)] == [b"cut"]
    assert tail_lines(path, 0) == []


def test_a_missing_log(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"none\.log does not exist"):
        LogReader(tmp_path / "none.log")
    assert tail_lines(tmp_path / "none.log", 3) == []
