"""Keys to detach by: their names, and finding them in what is typed."""

from __future__ import annotations

import pytest

from cli.streams.detach_keys import DetachKeys, parse
from host.errors import InvalidArgumentError


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("ctrl-p,ctrl-q", b"\x10\x11"),
        ("ctrl-@", b"\0"),
        ("ctrl-[,ctrl-\\,ctrl-],ctrl-^,ctrl-_", b"\x1b\x1c\x1d\x1e\x1f"),
        ("ctrl-A,x,~", b"\x01x~"),
        ("", b""),
    ],
)
def test_names(text: str, codes: bytes) -> None:
    assert parse(text) == codes


@pytest.mark.parametrize("text", ["ctrl-", "ctrl-1", "ctrl-pq", "xctrl-p", "F1", "a,,b", "é"])
def test_what_is_no_key(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="is no key to detach by"):
        parse(text)


@pytest.mark.parametrize(
    ("typed", "passed_on", "detached"),
    [
        ([b"abc"], b"abc", False),
        ([b"\x10\x11"], b"", True),
        ([b"a\x10\x11b"], b"a", True),
        ([b"a\x10", b"\x11"], b"a", True),
        ([b"\x10", b"x"], b"\x10x", False),
        ([b"\x10", b"\x10", b"\x11"], b"\x10", True),
        ([b"\x11\x10"], b"\x11", False),
    ],
)
def test_finding_them(typed: list[bytes], passed_on: bytes, detached: bool) -> None:
    keys = DetachKeys(b"\x10\x11")
    fed = [keys.feed(data) for data in typed]
    assert b"".join(data for data, _ in fed) == passed_on
    assert fed[-1][1] is detached


def test_keys_that_repeat_themselves() -> None:
    keys = DetachKeys(b"aab")
    assert [keys.feed(byte) for byte in (b"a", b"a", b"a", b"b")] == [
        (b"", False),
        (b"", False),
        (b"a", False),
        (b"", True),
    ]


def test_none_are_never_found() -> None:
    assert DetachKeys(b"").feed(b"\x10\x11") == (b"\x10\x11", False)
