from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri.config.toml_lines import KeyPath, key_lines

EXAMPLES: list[tuple[str, dict[KeyPath, int]]] = [
    ("", {}),
    ("# only = 'a comment'", {}),
    ("a = 1\n\nb = 2 # c = 3\n", {("a",): 1, ("b",): 3}),
    ("a.b.c = 1\na.b.d = 2", {("a",): 1, ("a", "b"): 1, ("a", "b", "c"): 1, ("a", "b", "d"): 2}),
    ('"a.b" = 1\n\'c d\' . "e\\"f" = 2', {("a.b",): 1, ("c d",): 2, ("c d", 'e"f'): 2}),
    ('"\\u00e9" = 1', {("é",): 1}),
    ("[t]\nx = 1\n[ u . 'v.w' ]\nx = 2", {("t",): 1, ("t", "x"): 2, ("u",): 3, ("u", "v.w"): 3, ("u", "v.w", "x"): 4}),
    ("[a.b]\nx = 1\n[a]\ny = 2", {("a",): 3, ("a", "b"): 1, ("a", "b", "x"): 2, ("a", "y"): 4}),
    (
        "[[t]]\nx = 1\n[[t]]\nx = 2\n[t.u]\ny = 3\n[[t.v]]\nz = 4\n[[t.v]]\nz = 5",
        {
            ("t",): 1,
            ("t", 0): 1,
            ("t", 0, "x"): 2,
            ("t", 1): 3,
            ("t", 1, "x"): 4,
            ("t", 1, "u"): 5,
            ("t", 1, "u", "y"): 6,
            ("t", 1, "v"): 7,
            ("t", 1, "v", 0): 7,
            ("t", 1, "v", 0, "z"): 8,
            ("t", 1, "v", 1): 9,
            ("t", 1, "v", 1, "z"): 10,
        },
    ),
    ("a = [\n  1, # one ]\n  2,\n]\nb = 3", {("a",): 1, ("a", 0): 2, ("a", 1): 3, ("b",): 5}),
    ("a = { b = 1, c.d = [\n{ e = 2 } ] }\nf = 3", {
        ("a",): 1, ("a", "b"): 1, ("a", "c"): 1, ("a", "c", "d"): 1, ("a", "c", "d", 0): 2, ("a", "c", "d", 0, "e"): 2,
        ("f",): 3,
    }),
    ('a = """\nb = 1\n\\"""\n"""\nc = 2', {("a",): 1, ("c",): 5}),
    ("a = '''\nb = 1\n'''\nc = 2", {("a",): 1, ("c",): 4}),
    ('a = """x"""""\nb = "#[=\\""\nc = \'\\\'\nd = ""\ne = 1', {("a",): 1, ("b",): 2, ("c",): 3, ("d",): 4, ("e",): 5}),
    ("a = 1979-05-27 07:32:00\r\nb = +1_0.5e3\r\n[c]\r\nd = true", {("a",): 1, ("b",): 2, ("c",): 3, ("c", "d"): 4}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "lines"), EXAMPLES)
def test_lines(text: str, lines: dict[KeyPath, int]) -> None:
    tomllib.loads(text)
    assert key_lines(text) == lines


def paths(value: object, path: KeyPath = ()) -> set[KeyPath]:
    found: set[KeyPath] = {path} if path else set()
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found |= paths(item, (*path, key))
    return found


PIECES = st.sampled_from(
    ["a", "b", "'c.d'", '"e\\"#"', ".", " = ", "\n", "[", "]", "[[", "]]", "{", "}", ", ", "1", "true",
     '"x\\\\"', "'''",
     '"""', "# z\n", "\t", '"', "'", "a = 1\n", "[a.b]\n", "[[f]]\n", "g = [1, {h = 2}]\n", "\r\n"]
)  # fmt: skip


@given(st.lists(PIECES, max_size=40).map("".join))
def test_every_key_that_tomllib_finds_has_a_line(text: str) -> None:
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    lines = key_lines(text)
    assert set(lines) == paths(tree)
    assert all(1 <= line <= text.count("\n") + 1 for line in lines.values())
