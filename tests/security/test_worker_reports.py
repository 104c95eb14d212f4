"""The report of an unpack worker that a layer controls cannot make the agent write outside of that layer."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from host.errors import InvalidArgumentError, PodkeelError
from images.unpack.unpacker import Unpacker
from tests.security.worker_attack import ANY, Program, layer, program, quiet, unpacker
from tests.support.image_builder import entry, make_tar

__all__ = ["layer", "program", "unpacker"]


@pytest.mark.parametrize(
    "report",
    [
        {"opaque_folders": ["../outside"]},
        {"opaque_folders": ["/outside"]},
        {"opaque_folders": ["link"]},
        {"opaque_folders": ["link/inside"]},
        {"opaque_folders": ["file"]},
        {"opaque_folders": ["missing"]},
        {"opaque_folders": ["a/" * 2000]},
        {"opaque_folders": ["x" * 40_000]},
        {"devices": [[False, 0o666, 1, 3, 0, 0, 0, ["../outside/null"]]]},
        {"devices": [[False, 0o666, 1, 3, 0, 0, 0, ["link/null"]]]},
        {"devices": [[False, 0o666, 1, 3, 0, 0, 0, ["file"]]]},
        {"devices": [[False, 0o666, 1, 3, 0, 0, 0, ["null", "../outside/null"]]]},
        {"devices": [[False, 0o666, 1, 3, 0, 0, 0, []]]},
        {"devices": [[False, 0o666, -1, 3, 0, 0, 0, ["null"]]]},
        {"devices": [[False, 0o666, 1 << 40, 3, 0, 0, 0, ["null"]]]},
        {"devices": [[False, 0o666, 1, 3, -7, 1 << 40, 0, ["null"]]]},
        {"devices": [[False, 0o666, 1, 3, 0, 0, 1 << 100, ["null"]]]},
        {"devices": [[True, 0o666, 1, 3, 0, 0, 0, ["."]]]},
        {"used_bytes": -5},
        {"used_bytes": 1 << 80},
        {"used_bytes": (1 << 63) - 1},  # the sum of three such layers does not fit into ImageFsInfo
        {"used_inodes": (1 << 63) - 1},
        {"implied": ["\0"]},
    ],
    ids=lambda report: str(report)[:60],
)
async def test_a_false_report_creates_nothing_outside(
    program: Program, unpacker: Unpacker, layer: Path, report: dict[str, object]
) -> None:
    outside = layer.parent / "outside"
    (outside / "inside").mkdir(parents=True)
    text = json.dumps(report)
    program(
        f"""
def in_hex(value):
    if isinstance(value, dict):
        return {{key: in_hex(item) for key, item in value.items()}}
    if isinstance(value, list):
        return [in_hex(item) for item in value]
    return value.encode().hex() if isinstance(value, str) else value
def work(read, max_bytes, max_entries):
    os.symlink({str(outside)!r}, "link")
    os.close(os.open("file", os.O_CREAT))
    return in_hex(json.loads({text!r}))
"""
    )
    with pytest.raises((PodkeelError, InvalidArgumentError)) as caught:
        await unpacker.unpack(quiet(), ANY, layer, None, "attack")
    assert caught.value.message.startswith("attack ")
    assert [path.name for path in outside.iterdir()] == ["inside"]
    assert os.listxattr(outside) == os.listxattr(outside / "inside") == []


@pytest.mark.parametrize(
    "output",
    ["b'[' * 100_000", "b'x' * (40 << 20)", "b''", "b'{}' * 2", 'b\'{"message":"zz"}\'', "b'[1,2]'"],
    ids=["nested", "endless", "nothing", "two", "no hexadecimal", "list"],
)
async def test_any_invalid_output_is_an_error_of_the_layer(
    program: Program, unpacker: Unpacker, layer: Path, output: str
) -> None:
    program(
        f"""
def work(read, max_bytes, max_entries):
    data = {output}
    while data:
        data = data[os.write(1, data):]
    os._exit(0)
"""
    )
    with pytest.raises(PodkeelError, match=r"^attack could not be unpacked: the worker ended"):
        await unpacker.unpack(quiet(), ANY, layer, None, "attack")


async def test_a_valid_layer_has_its_devices_and_marks(unpacker: Unpacker, layer: Path) -> None:
    async def chunks() -> AsyncGenerator[bytes, None]:
        yield make_tar(
            [
                entry("dev/null", kind=b"3", device=(1, 3), mode=0o666, uid=5, gid=6, mtime=77),
                entry("dev/zero", kind=b"1", link="dev/null"),
                entry("dev/disk", kind=b"4", device=(8, 0), mode=0o4660),
                entry("dev/gone", kind=b"3", device=(1, 1)),
                entry("dev/gone", "a file"),
                entry("etc/.wh..wh..opq"),
                entry("etc/.wh.passwd"),
            ]
        )

    unpacked = await unpacker.unpack(chunks(), ANY, layer, None, "layer")
    null = (layer / "dev/null").lstat()
    assert (oct(null.st_mode), null.st_rdev, null.st_uid, null.st_gid) == ("0o20666", os.makedev(1, 3), 5, 6)
    assert null.st_mtime == 77
    assert null.st_ino == (layer / "dev/zero").lstat().st_ino
    disk = (layer / "dev/disk").lstat()
    assert (oct(disk.st_mode), disk.st_rdev) == ("0o64660", os.makedev(8, 0))
    assert (layer / "dev/gone").read_text() == "a file"
    assert os.getxattr(layer / "etc", "trusted.overlay.opaque") == b"y"
    assert (layer / "etc/passwd").lstat().st_rdev == 0
    assert unpacked.used_inodes == sum(1 for _ in layer.rglob("*")) + 1 - 1  # one node has two names
    assert unpacked.used_bytes == 4096 * (3 + 1)
