"""Reads small kernel files repeatedly: keeps their descriptors open, so that each reading is one ``pread``."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, TypeVar

from host.files import descriptors

T = TypeVar("T")

_SIZE = 16 * 1024


class DescriptorBudget:
    """Limits the descriptors that all folders keep open. Above the limit, files are opened for each reading."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.kept = 0
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Reserve one descriptor. Returns False if the limit is reached."""
        with self._lock:
            if self.kept >= self.limit or descriptors.scarce():
                return False
            self.kept += 1
            return True

    def release(self, count: int) -> None:
        """Release ``count`` descriptors, which were closed."""
        with self._lock:
            self.kept -= count


class Folder:
    """The files of one cgroup in one hierarchy. Several threads may use it; one reads at a time."""

    __slots__ = ("_budget", "_lock", "_missing", "_open", "_parsed", "path")

    def __init__(self, path: str, budget: DescriptorBudget) -> None:
        self.path = path
        self._budget = budget
        self._open: dict[str, int] = {}
        self._missing: set[str] = set()
        self._parsed: dict[str, tuple[bytes, Any]] = {}
        self._lock = threading.Lock()

    def read(self, name: str) -> bytes | None:
        """The file's content; None if this kernel does not have the file or the cgroup is gone."""
        return self.read_all((name,))[0]

    def read_all(self, names: Sequence[str]) -> list[bytes | None]:
        """The contents of several files, each as from ``read``. Faster than several calls."""
        contents: list[bytes | None] = []
        with self._lock:
            for name in names:
                descriptor = self._open.get(name)
                if descriptor is None:
                    contents.append(self._read_first(name))
                    continue
                try:
                    content = os.pread(descriptor, _SIZE, 0)
                    contents.append(content if len(content) < _SIZE else content + read_rest(descriptor, _SIZE))
                except OSError:  # ENODEV once the cgroup is removed; a new one may have the same name
                    self._close()
                    contents.append(None)
        return contents

    def parsed_content(self, name: str, content: bytes | None, parse: Callable[[bytes], T]) -> T | None:
        """The result of ``parse`` for the content of file ``name``.

        Unchanged content is not parsed again, because most cgroups are idle.
        """
        if content is None:
            return None
        known = self._parsed.get(name)
        if known is None or known[0] != content:
            known = self._parsed[name] = (content, parse(content))
        value: T = known[1]
        return value

    def number(self, name: str) -> int | None:
        """The number in the file; None also for ``max``."""
        return number(self.read(name))

    def numbers(self, *names: str) -> list[int | None]:
        """The numbers of several files."""
        return list(map(number, self.read_all(names)))

    def close(self) -> None:
        """Close the kept descriptors. A later reading opens them again."""
        with self._lock:
            self._close()

    def _read_first(self, name: str) -> bytes | None:
        if name in self._missing:
            return None
        try:
            descriptor = os.open(f"{self.path}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            if os.access(self.path, os.F_OK):
                self._missing.add(name)
            return None
        except OSError:
            return None
        keep = False
        try:
            content = read_rest(descriptor, 0)
            keep = self._budget.take()
            return content
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:  # a pressure file, on a kernel with PSI disabled
                self._missing.add(name)
            return None
        finally:
            if keep:
                self._open[name] = descriptor
            else:
                os.close(descriptor)

    def _close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._budget.release(len(self._open))
        self._open.clear()
        self._missing.clear()
        self._parsed.clear()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):
            self._close()


def number(content: bytes | None) -> int | None:
    """The number that is the whole content; None for ``max`` and for a missing file."""
    return None if content is None or content.startswith(b"max") else int(content)


class Fields:
    """Extracts fields of a file of ``key value`` lines. Fast if their positions are the same as last time."""

    def __init__(self, *keys: str) -> None:
        if len(keys) < 2:
            raise ValueError("at least two keys")
        self._keys = tuple(key.encode() for key in keys)
        self._layouts: dict[int, _Layout] = {}

    def parse(self, content: bytes) -> tuple[int, ...]:
        """The values in the order of the keys; 0 for a key that is missing."""
        words: list[bytes] = content.split()
        words.append(b"0")
        layout = self._layouts.get(len(words))
        if layout is None or words[:-1:2] != layout.names:
            layout = self._layouts[len(words)] = _Layout(self._keys, words)
        return tuple(map(int, layout.values(words)))


class _Layout:
    def __init__(self, keys: Sequence[bytes], words: list[bytes]) -> None:
        self.names = words[:-1:2]
        places = {name: 2 * position + 1 for position, name in enumerate(self.names)}
        self.values = itemgetter(*(places.get(key, -1) for key in keys))  # the last word is the zero for absent keys


def read_rest(descriptor: int, offset: int = 0) -> bytes:
    """All bytes from ``offset`` on, of a file that supports pread(2)."""
    parts = []
    while chunk := os.pread(descriptor, _SIZE, offset):
        parts.append(chunk)
        offset += len(chunk)
    return b"".join(parts)
