"""Writes layers of random tars below a folder that becomes the root of this process: ``SECONDS FOLDER``.

``test_parsers.py`` runs it as a separate program, as the agent does with its worker. Prints the tar and exits with 1 if
reader or writer raise an error that is not their own.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import sys
import traceback
from pathlib import Path

from images.unpack.layer_writer import LayerWriter
from images.unpack.tar.headers import LimitError, TarError
from images.unpack.tar.reader import Stream, TarReader
from tests.fuzz.tars import changed_tar
from tests.support.fuzz import rounds

MOST_BYTES = 1 << 20
MOST_ENTRIES = 1000


def write_one(seed: int) -> bytes | None:
    """Write a layer. Returns the tar if it caused an unexpected error, otherwise None."""
    content = changed_tar(random.Random(seed))
    left = memoryview(content)

    def read(size: int) -> bytes:
        nonlocal left
        piece, left = bytes(left[:size]), left[size:]
        return piece

    try:
        LayerWriter(TarReader(Stream(read, len, MOST_BYTES)), MOST_ENTRIES).write_all()
    except (TarError, LimitError) as error:
        str(error)
    except BaseException:
        traceback.print_exc()
        return content
    return None


def main() -> int:
    duration, folder = float(sys.argv[1]), sys.argv[2]
    layer = Path("/layer")
    os.chroot(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, 64 << 20))
    count = 0
    for seed in rounds(duration):
        count += 1
        layer.mkdir()
        os.chdir(layer)
        inner = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
        os.chroot(layer)
        fault = write_one(seed)
        os.fchdir(inner)
        os.chroot(".")
        os.close(inner)
        if list(Path("/").iterdir()) != [layer]:
            print(f"seed {seed}: {list(Path('/').iterdir())} is outside of the layer")
            return 1
        shutil.rmtree(layer, ignore_errors=True)
        if fault is not None:
            print(f"seed {seed}: {fault.hex()}")
            return 1
    print(f"{count} layers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
