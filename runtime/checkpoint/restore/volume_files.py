"""Files of volumes that a checkpoint's processes have open. Blocks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from proto.criu.v1 import images_pb2
from runtime.checkpoint.restore import criu_images

_FILES = "files.img"
_MAGIC = 8


def forget_sizes(layer: Path, target: Path) -> None:
    """Have CRIU take files of volumes that are open for writing with any size.

    A volume is not part of a checkpoint, and others write to it: a log in it may have grown since. CRIU would refuse
    it. The image in the folder ``target``, a link to that of ``layer``, is replaced if it has such files.
    """
    volumes = set(_volumes(layer))
    found, changed = [], False
    for entry in criu_images.entries(layer / _FILES, images_pb2.File):
        file = entry.reg
        if file.HasField("size") and file.mnt_id in volumes and file.flags & os.O_ACCMODE != os.O_RDONLY:
            file.ClearField("size")
            changed = True
        found.append(entry)
    if changed:
        with (layer / _FILES).open("rb") as image:
            begin = image.read(_MAGIC)
        (target / _FILES).unlink()
        criu_images.write(target / _FILES, begin, *found)


def _volumes(layer: Path) -> Iterator[int]:
    """The numbers of the mounts that the OCI runtime gives."""
    for path in layer.glob("mountpoints-*.img"):
        for mount in criu_images.entries(path, images_pb2.Mount):
            if mount.ext_key and mount.mountpoint.removeprefix(".").rstrip("/"):
                yield mount.mnt_id
