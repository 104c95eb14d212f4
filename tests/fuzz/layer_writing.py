"""Writes layers of random tars below a folder that becomes the root of this process: ``SECONDS FOLDER``.

``test_parsers.py`` runs it as a separate program, as the agent does with its worker. Each layer is written by one
process, and again with a helper process. Prints the tar and exits with 1 if reader or writer raise an error that is not
their own, or if the two layers differ.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import stat
import sys
import traceback
from pathlib import Path

from images.unpack.tar.headers import LimitError, TarError
from images.unpack.tar.reader import Stream, TarReader
from images.unpack.writing import helped_writer
from images.unpack.writing.helper_process import HelperProcess
from images.unpack.writing.layer_writer import LayerWriter
from tests.fuzz.tars import changed_tar, crowded_tar
from tests.support.fuzz import rounds

MAX_BYTES = 1 << 20
MAX_ENTRIES = 1000
_RECENT = 1_500_000_000_000_000_000  # folders that no entry describes have the time of their making


def write_one(content: bytes, step: int, *, helped: bool) -> str:
    """Write a layer to the root, reading ``step`` bytes at a time. Returns the error message, or all that was made."""
    left = memoryview(content)

    def read(size: int) -> bytes:
        nonlocal left
        piece, left = bytes(left[: min(size, step)]), left[min(size, step) :]
        return piece

    reader = TarReader(Stream(read, len, MAX_BYTES))
    writer = LayerWriter(reader, MAX_ENTRIES)
    if helped:
        helper = HelperProcess()
        if helper.fork():
            try:
                helper.serve()
            except BaseException:
                traceback.print_exc()
            os._exit(0)
        writer = helped_writer.HelpedLayerWriter(reader, MAX_ENTRIES, helper)
    try:
        writer.write_all()
    except (TarError, LimitError) as error:
        return str(error)
    finally:
        if helped:
            helper.end()
    lists = [sorted(paths) for paths in (writer.implied, writer.hiding, writer.opaque_folders)]
    devices = sorted(device.paths for device in writer.devices)
    return repr((writer.used_bytes, writer.used_inodes, writer.entries, writer.opaque, lists, devices, _tree()))


def _tree() -> list[tuple[object, ...]]:
    """All that is below the root."""
    found: list[tuple[object, ...]] = []
    numbers: dict[int, int] = {}  # of files, as links show them
    for folder, folders, files in os.walk("/"):
        folders.sort()
        for name in sorted(folders + files):
            path = Path(folder, name)
            status = path.lstat()
            content: object = None
            if stat.S_ISREG(status.st_mode):
                content = path.read_bytes()
            elif stat.S_ISLNK(status.st_mode):
                content = path.readlink()
            number = numbers.setdefault(status.st_ino, len(numbers))
            mtime = status.st_mtime_ns if status.st_mtime_ns < _RECENT else _RECENT
            found.append((str(path), status.st_mode, status.st_uid, status.st_gid, mtime, number, content))
    return found


def main() -> int:
    duration, folder = float(sys.argv[1]), sys.argv[2]
    layer = Path("/layer")
    os.umask(0)
    os.chroot(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, 64 << 20))
    vars(helped_writer)["MAX_FILES"] = 4  # so that several batches are under way
    count = 0
    for seed in rounds(duration):
        count += 1
        generator = random.Random(seed)
        content = generator.choice((changed_tar, crowded_tar))(generator)
        step = generator.choice((1 << 20, 3000, 700))
        outcomes = []
        for helped in (False, True):
            layer.mkdir()
            os.chdir(layer)
            inner = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
            os.chroot(layer)
            try:
                outcomes.append(write_one(content, step, helped=helped))
            except BaseException:
                traceback.print_exc()
            os.fchdir(inner)
            os.chroot(".")
            os.close(inner)
            if list(Path("/").iterdir()) != [layer]:
                print(f"seed {seed}: {list(Path('/').iterdir())} is outside of the layer")
                return 1
            shutil.rmtree(layer, ignore_errors=True)
        if len(outcomes) != 2 or outcomes[0] != outcomes[1]:
            print(f"seed {seed}: {outcomes} {content.hex()}")
            return 1
    print(f"{count} layers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
