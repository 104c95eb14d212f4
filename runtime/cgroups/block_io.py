"""Block I/O limits of an existing cgroup: read, and replaced as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from host.errors import UnsupportedError
from runtime.cgroups.tree import CgroupTree
from runtime.specgen.config import BlockIO

_RATES = tuple(f"throttle_{what}_device" for what in ("read_bps", "write_bps", "read_iops", "write_iops"))
_V1_FILES = tuple(f"blkio.{name.replace('_', '.', 1)}" for name in _RATES)  # blkio.throttle.read_bps_device
_V2_KEYS = ("rbps", "wbps", "riops", "wiops")
_WEIGHTS = {1: "blkio.bfq.weight", 2: "io.bfq.weight"}
_DISK_WEIGHTS = {1: "blkio.bfq.weight_device", 2: "io.bfq.weight"}
_DEFAULT_WEIGHT = "100"


@dataclass(frozen=True, slots=True)
class BlockIoSettings:
    """The block I/O settings of a cgroup: for each file the values by disk (``8:0``), and its weight (empty: no file).

    The rates are those of _V1_FILES, or with version 2 those of _V2_KEYS in one file. Rates without a limit are left
    out.
    """

    rates: Mapping[str, Mapping[str, str]]
    disk_weights: Mapping[str, str]
    weight: str


def settings_of(limits: BlockIO) -> BlockIoSettings:
    """The settings for limits of an OCI spec."""
    rates = {
        name: {f"{one.major}:{one.minor}": str(one.rate) for one in getattr(limits, name) if one.rate}
        for name in _RATES
    }
    weights = {f"{one.major}:{one.minor}": str(one.weight) for one in limits.weight_device}
    return BlockIoSettings(rates, weights, str(limits.weight or _DEFAULT_WEIGHT))


def read_block_io(cgroups: CgroupTree, path: str) -> BlockIoSettings:
    """The settings of cgroup ``path``. Raises OSError, or UnsupportedError if there is no such controller."""
    folder = _folder(cgroups, path)
    if cgroups.version == 1:
        files = zip(_RATES, _V1_FILES, strict=True)
        rates: dict[str, dict[str, str]] = {name: dict(_lines(folder / file)) for name, file in files}
    else:
        rates = {name: {} for name in _RATES}
        for disk, values in _lines(folder / "io.max"):
            found = dict(value.split("=") for value in values.split())
            for name, key in zip(_RATES, _V2_KEYS, strict=True):
                if found.get(key, "max") != "max":
                    rates[name][disk] = found[key]
    weight, disks = "", {}
    for file in {_WEIGHTS[cgroups.version], _DISK_WEIGHTS[cgroups.version]}:
        for key, value in _lines(folder / file) if (folder / file).exists() else ():
            if key == "default":
                weight = value
            elif ":" in key:
                disks[key] = value
            else:
                weight = key
    return BlockIoSettings(rates, disks, weight)


def write_block_io(cgroups: CgroupTree, path: str, wanted: BlockIoSettings) -> None:
    """Replace the settings of cgroup ``path``. Limits that ``wanted`` does not have are removed.

    Raises OSError, or UnsupportedError if the kernel lacks the controller or weights.
    """
    folder, now = _folder(cgroups, path), read_block_io(cgroups, path)
    for number, name in enumerate(_RATES):
        for disk in {*now.rates[name], *wanted.rates[name]}:
            value = wanted.rates[name].get(disk)
            if value == now.rates[name].get(disk):
                continue
            if cgroups.version == 1:
                (folder / _V1_FILES[number]).write_text(f"{disk} {value or 0}")
            else:
                (folder / "io.max").write_text(f"{disk} {_V2_KEYS[number]}={value or 'max'}")
    _write_weights(folder, cgroups.version, now, wanted)


def _write_weights(folder: Path, version: int, now: BlockIoSettings, wanted: BlockIoSettings) -> None:
    if not now.weight:
        if wanted.disk_weights or wanted.weight not in ("", _DEFAULT_WEIGHT):
            raise UnsupportedError(f"{folder} has no {_WEIGHTS[version]}: this kernel has no weights of block I/O")
        return
    if wanted.weight and wanted.weight != now.weight:
        (folder / _WEIGHTS[version]).write_text(wanted.weight)
    for disk, _ in now.disk_weights.items() ^ wanted.disk_weights.items():
        (folder / _DISK_WEIGHTS[version]).write_text(f"{disk} {wanted.disk_weights.get(disk, 'default')}")


def _folder(cgroups: CgroupTree, path: str) -> Path:
    root = cgroups.mounts.get("unified" if cgroups.version == 2 else "blkio")
    if root is None:
        raise UnsupportedError("the blkio cgroup controller is not mounted")
    folder = root / path.lstrip("/")
    if not (folder / ("io.max" if cgroups.version == 2 else _V1_FILES[0])).exists():
        raise UnsupportedError(f"{folder} has no limits of block I/O: its controller is not enabled there")
    return folder


def _lines(file: Path) -> Iterable[tuple[str, str]]:
    """The first word of each line, and the rest."""
    for line in file.read_text().splitlines():
        key, _, value = line.partition(" ")
        yield key, value
