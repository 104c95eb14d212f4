"""The line of each key in a TOML text, for errors and ``podkeel config``. tomllib gives only the values.

Follows TOML 1.0 (https://toml.io/en/v1.0.0). Only for text that tomllib has accepted; it checks nothing itself.
"""

from __future__ import annotations

import tomllib

KeyPath = tuple[str | int, ...]

_BLANK = " \t\r\n"
_ENDS_BARE_KEY = "=.]" + _BLANK
_ENDS_BARE_VALUE = ",]}#\n"


def key_lines(text: str) -> dict[KeyPath, int]:
    """The line (from 1) of each key and table header of ``text``; elements of arrays have their index in the path.

    A table that only appears as a part of longer keys (``a`` in ``a.b = 1`` or ``[a.b]``) gets the line of its first
    mention; a table with a header gets the line of its header.
    """
    return _Scanner(text).scan()


class _Scanner:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._lines: dict[KeyPath, int] = {}
        self._array_lengths: dict[KeyPath, int] = {}

    def scan(self) -> dict[KeyPath, int]:
        table: KeyPath = ()
        while self._skip_blank():
            if self._text.startswith("[[", self._at):
                self._at += 2
                table = self._header(array=True)
                self._at += 2
            elif self._text[self._at] == "[":
                self._at += 1
                table = self._header(array=False)
                self._at += 1
            else:
                self._pair(table)
        return self._lines

    def _line(self, at: int) -> int:
        return self._text.count("\n", 0, at) + 1

    def _skip_blank(self) -> bool:
        """Go past blanks, line ends and comments; False at the end of the text."""
        while self._at < len(self._text):
            if self._text[self._at] == "#":
                end = self._text.find("\n", self._at)
                self._at = len(self._text) if end < 0 else end
            elif self._text[self._at] in _BLANK:
                self._at += 1
            else:
                return True
        return False

    def _header(self, *, array: bool) -> KeyPath:
        line = self._line(self._at)
        path: KeyPath = ()
        parts = self._key()
        for number, part in enumerate(parts, start=1):
            path += (part,)
            last = number == len(parts)
            if last and array:
                self._lines.setdefault(path, line)
                index = self._array_lengths.get(path, 0)
                self._array_lengths[path] = index + 1
                path += (index,)
            elif path in self._array_lengths:
                path += (self._array_lengths[path] - 1,)
            if last:
                self._lines[path] = line
            else:
                self._lines.setdefault(path, line)
        return path

    def _pair(self, table: KeyPath) -> None:
        line = self._line(self._at)
        path = table
        for part in self._key():
            path += (part,)
            self._lines.setdefault(path, line)
        self._at += 1  # the equals sign
        self._value(path)

    def _key(self) -> list[str]:
        """A possibly dotted key, up to what ends it."""
        parts: list[str] = []
        while True:
            self._skip_blank()
            start = self._at
            if self._text[start] in "\"'":
                self._string()
                parts.append(tomllib.loads("key = " + self._text[start : self._at])["key"])
            else:
                while self._text[self._at] not in _ENDS_BARE_KEY:
                    self._at += 1
                parts.append(self._text[start : self._at])
            self._skip_blank()
            if self._text[self._at] != ".":
                return parts
            self._at += 1

    def _value(self, path: KeyPath) -> None:
        self._skip_blank()
        match self._text[self._at]:
            case '"' | "'":
                self._string()
            case "[":
                self._array(path)
            case "{":
                self._inline_table(path)
            case _:
                while self._at < len(self._text) and self._text[self._at] not in _ENDS_BARE_VALUE:
                    self._at += 1

    def _array(self, path: KeyPath) -> None:
        self._at += 1
        index = 0
        while True:
            self._skip_blank()
            if self._text[self._at] == "]":
                break
            if self._text[self._at] == ",":
                self._at += 1
                continue
            self._lines[(*path, index)] = self._line(self._at)
            self._value((*path, index))
            index += 1
        self._at += 1

    def _inline_table(self, path: KeyPath) -> None:
        self._at += 1
        while True:
            self._skip_blank()
            if self._text[self._at] == "}":
                break
            if self._text[self._at] == ",":
                self._at += 1
                continue
            self._pair(path)
        self._at += 1

    def _string(self) -> None:
        """Go past a string of any of the four kinds."""
        quote = self._text[self._at]
        escapes = quote == '"'
        if self._text.startswith(quote * 3, self._at):
            self._at += 3
            while not self._text.startswith(quote * 3, self._at):
                self._at += 2 if escapes and self._text[self._at] == "\\" else 1
            while self._text.startswith(quote, self._at):  # up to two quotes may be directly before the closing three
                self._at += 1
            return
        self._at += 1
        while self._text[self._at] != quote:
            self._at += 2 if escapes and self._text[self._at] == "\\" else 1
        self._at += 1
