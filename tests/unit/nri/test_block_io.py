"""The files of block I/O limits of a cgroup, in the forms of both versions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from host.errors import UnsupportedError
from runtime.cgroups.block_io import read_block_io, settings_of, write_block_io
from runtime.specgen import config


def tree(root: Path, version: int) -> Any:
    (root / "c").mkdir()
    return SimpleNamespace(version=version, mounts={"unified" if version == 2 else "blkio": root})


def test_version_2(tmp_path: Path) -> None:
    cgroups, folder = tree(tmp_path, 2), tmp_path / "c"
    with pytest.raises(UnsupportedError, match="no limits of block I/O"):
        read_block_io(cgroups, "/c")
    (folder / "io.max").write_text("8:0 rbps=1048576 wbps=max riops=max wiops=120\n254:16 rbps=max riops=7\n")
    (folder / "io.bfq.weight").write_text("default 100\n8:0 300\n")
    found = read_block_io(cgroups, "/c")
    assert [dict(values) for values in found.rates.values()] == [
        {"8:0": "1048576"},
        {},
        {"254:16": "7"},
        {"8:0": "120"},
    ]
    assert (found.disk_weights, found.weight) == ({"8:0": "300"}, "100")
    write_block_io(cgroups, "/c", found)
    assert read_block_io(cgroups, "/c") == found  # nothing was written
    limits = config.BlockIO(throttle_read_bps_device=[config.Throttle(8, 0, 1 << 20), config.Throttle(8, 16, 5)])
    (folder / "io.max").write_text("8:0 rbps=1048576\n")
    write_block_io(cgroups, "/c", settings_of(limits))
    assert (folder / "io.max").read_text() == "8:16 rbps=5"
    assert (folder / "io.bfq.weight").read_text() == "8:0 default"


def test_version_1_without_weights(tmp_path: Path) -> None:
    cgroups, folder = tree(tmp_path, 1), tmp_path / "c"
    for name in ("read_bps", "write_bps", "read_iops", "write_iops"):
        (folder / f"blkio.throttle.{name}_device").write_text("")
    (folder / "blkio.throttle.read_bps_device").write_text("8:0 50000000\n")
    write_block_io(cgroups, "/c", settings_of(config.BlockIO()))
    assert (folder / "blkio.throttle.read_bps_device").read_text() == "8:0 0"
    with pytest.raises(UnsupportedError, match="no weights of block I/O"):
        write_block_io(cgroups, "/c", settings_of(config.BlockIO(weight=80)))
