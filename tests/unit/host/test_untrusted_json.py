from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from host.untrusted_json import DEEPEST, JsonError, decode, read_file


def nested(depth: int, opening: str = "[", closing: str = "]") -> bytes:
    return (opening * depth + closing * depth).encode()


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('{"a":[', "]}")])
def test_depth(opening: str, closing: str) -> None:
    each = opening.count("[") + opening.count("{")
    inner = "1" if opening.endswith(":") else ""
    content = (opening * (DEEPEST // each) + inner + closing * (DEEPEST // each)).encode()
    assert decode(content, Any)
    for depth in (DEEPEST // each + 1, 3000, 100_000):
        with pytest.raises(JsonError, match="nests"):
            decode((opening * depth + inner + closing * depth).encode(), Any)


def test_brackets_and_commas_in_strings_do_not_count() -> None:
    for text in ("[" * 40_000, '\\"[{' * 20_000, "\\" * 16_383 + '"[,' * 9_000, "," * 200_000, '"' * 70_000):
        content = json.dumps({"a": text}).encode()
        assert decode(content, dict[str, str], max_values=10) == {"a": text}


def test_pieces_are_cut_anywhere() -> None:
    for length in range(16_370, 16_400):
        text = "x" * length + '\\\\"' + "[" * 100
        assert decode(json.dumps([text, "y"]).encode(), list[str], max_values=5) == [text, "y"]
        with pytest.raises(JsonError, match="nests"):
            decode(json.dumps([text, json.loads(nested(DEEPEST))]).encode(), Any)


def test_values() -> None:
    assert len(decode(json.dumps(list(range(1000))).encode(), list[int], max_values=1000)) == 1000
    for content in (
        json.dumps(list(range(1002))),
        json.dumps([{}] * 600),
        json.dumps({str(n): n for n in range(1002)}),
    ):
        with pytest.raises(JsonError, match="more than 1000 values"):
            decode(content.encode(), Any, max_values=1000)


def test_size_and_form() -> None:
    with pytest.raises(JsonError, match="larger than 10 bytes"):
        decode(b"[" + b" " * 10 + b"]", Any, max_bytes=10)
    for wrong in (b"", b"]" * 100, b"\xff", b'"\\ud800"', b"{} {}", b"[" * 10, b'{"a":"' + b"[" * 100):
        with pytest.raises(JsonError):
            decode(wrong, Any)
    with pytest.raises(JsonError, match="Expected `int`"):
        decode(b'"x"', int)


def test_text_that_is_not_unicode_is_replaced_on_demand() -> None:
    for written, read in (
        (b"Jos\xe9", "Jos\ufffd"),
        (b"\\ud83d", "\ufffd"),
        (b"\\ude00\\n", "\ufffd\n"),
        (b"\\ud83d\\ud83d\\ude00\xff", "\ufffd\U0001f600\ufffd"),
        (b"\\\\ud83d\\ud83d\\u0041", "\\ud83d\ufffdA"),
        (b'\xed\xa0\x80\\"[', '\ufffd\ufffd\ufffd"['),
    ):
        content = b'{"a": "' + written + b'", "' + written + b'": 1}'
        with pytest.raises(JsonError):
            decode(content, dict[str, Any])
        assert decode(content, dict[str, Any], any_text=True) == {"a": read, read: 1}
    for wrong in (b"\xff", b'{"a": "\\ud83d"', b'{"a": "\\ud83"}', b"[" * 65 + b'"\xff"' + b"]" * 65):
        with pytest.raises(JsonError):
            decode(wrong, Any, any_text=True)


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"{}")
    (tmp_path / "link").symlink_to(file)
    assert read_file(tmp_path / "link") == b"{}"
    with pytest.raises(JsonError, match="larger than 1 bytes"):
        read_file(file, 1)
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "."):
        with pytest.raises((JsonError, IsADirectoryError)):
            read_file(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "absent")
