"""Runs an attacker's program in the unpack worker, in place of the program that reads the tar."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from images.oci.manifests import Descriptor
from images.unpack import unpacker as unpacking
from images.unpack.unpacker import Unpacker
from tests.support.image_builder import entry, folder, make_tar

Program = Callable[[str], None]

ANY = Descriptor("", "", -1)

PRELUDE = """
import ctypes, errno, json, os, resource, socket, stat, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
found = {}
def attempt(name, work):
    try:
        found[name] = f"worked: {work()!r}"
    except OSError as error:
        found[name] = errno.errorcode[error.errno]
def call(name, number, *arguments):
    def work():
        result = libc.syscall(ctypes.c_long(number), *arguments)
        if result < 0:
            raise OSError(ctypes.get_errno(), "")
        return result
    attempt(name, work)
"""


async def quiet() -> AsyncGenerator[bytes, None]:
    yield make_tar([folder("a"), entry("a/b", "c")])


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    path = tmp_path / "layer"
    path.mkdir(mode=0o755)
    return path


@pytest.fixture
def unpacker() -> Iterator[Unpacker]:
    with closing(Unpacker(max_bytes=1 << 20, max_entries=100, max_seconds=2, parallel=2)) as made:
        yield made


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Program:
    """Makes workers call the function ``work`` of this program instead of unpacking."""

    def replace(source: str) -> None:
        start = "import sys; sys.path[:0] = sys.argv[1:2]; sys.path += sys.argv[2:3]\n"
        monkeypatch.setattr(
            unpacking, "START", f"{start}{PRELUDE}{source}\nfrom images.unpack.worker import main\nmain(work)\n"
        )

    return replace
