"""Unpacks archives from standard input, each in a child that has a new folder as its root; says what ends badly.

Each archive comes with its length before it (eight bytes). One line per archive: ``ok``, or what was raised.
"""

from __future__ import annotations

import os
import sys
import tempfile

from images.layer_writer import LayerWriter
from images.tar_headers import LimitError, TarError
from images.tar_reader import Stream, TarReader


def outcome(data: bytes) -> str:
    """What unpacking ``data`` to the working folder comes to."""
    rest = memoryview(data)

    def read(size: int) -> bytes:
        nonlocal rest
        piece, rest = rest[:size], rest[size:]
        return bytes(piece)

    stream = Stream(read, lambda chunk: None, 1 << 24)
    try:
        LayerWriter(TarReader(stream), 10_000).write_all()
        stream.drain()
    except (TarError, LimitError):
        return "ok"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "ok"


def main() -> None:
    """Until standard input ends."""
    while size := sys.stdin.buffer.read(8):
        data = sys.stdin.buffer.read(int.from_bytes(size, "big"))
        with tempfile.TemporaryDirectory() as folder:
            if (child := os.fork()) == 0:
                os.chroot(folder)
                os.chdir("/")
                os.umask(0)
                os.write(1, outcome(data).encode("ascii", "backslashreplace") + b"\n")
                os._exit(0)
            if os.waitpid(child, 0)[1]:
                os.write(1, b"died\n")


if __name__ == "__main__":
    main()
