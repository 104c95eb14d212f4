"""Classes of block I/O, which the node's administrator defines in a file, as limits of a container.

The file has the same form as for containerd and CRI-O: a map ``Classes`` from names to lists of settings. Settings
without ``Devices`` set the weight on all disks. Others are for the disks whose paths match one of the patterns; later
ones replace earlier ones for the same disk. Names of keys are not case-sensitive.
"""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path

import msgspec

from host.errors import InvalidArgumentError
from runtime.specgen import config

_FILE_BYTES = 1 << 20
_MAX_DISKS = 1024  # of one class
_LOWEST_WEIGHT, _MAX_WEIGHT = 10, 1000
_INT64_END = 1 << 63
_QUANTITY = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?(|[kMGTPE]|[KMGTPE]i)")
_UNITS = {"": 1} | {unit: 1000**power for power, unit in enumerate("kMGTPE", 1)}
_UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("KMGTPE", 1)}

_Number = int | float | str


class _Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="lower"):
    devices: Sequence[str] | None = None
    weight: _Number = ""
    throttlereadbps: _Number = ""
    throttlewritebps: _Number = ""
    throttlereadiops: _Number = ""
    throttlewriteiops: _Number = ""


class _Classes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    classes: Mapping[str, Sequence[dict[str, object]]] = {}


def block_io(file: str, name: str) -> config.BlockIO:
    """The limits of the class ``name`` of ``file`` on the disks that exist now. Blocks.

    Raises InvalidArgumentError if there is no such class, and for an invalid file or class.
    """
    classes = _read(file)
    if name not in classes:
        known = ", ".join(sorted(classes)[:20]) or "none"
        raise InvalidArgumentError(f"{file} has no class {name!r} of block I/O: it has {known}")
    try:
        return _combined([msgspec.convert(_lower(settings), _Settings) for settings in classes[name]])
    except (msgspec.ValidationError, ValueError) as error:
        raise InvalidArgumentError(f"{file}: class {name!r}: {error}") from error


def _read(file: str) -> Mapping[str, Sequence[dict[str, object]]]:
    import yaml  # loaded at the start where it is needed, see ``Agent``

    try:
        with open(file, "rb") as opened:
            content = opened.read(_FILE_BYTES + 1)
        if len(content) > _FILE_BYTES:
            raise ValueError(f"it is larger than {_FILE_BYTES} bytes")
        return msgspec.convert(_lower(yaml.safe_load(content) or {}), _Classes).classes
    except (OSError, yaml.YAMLError, RecursionError, ValueError, msgspec.ValidationError) as error:
        raise InvalidArgumentError(f"classes of block I/O: {file} cannot be read: {error}") from error


def _lower(document: object) -> object:
    if not isinstance(document, dict):
        return document
    return {str(key).lower(): value for key, value in document.items()}


def _combined(all_settings: Sequence[_Settings]) -> config.BlockIO:
    weight = None
    by_disk: dict[str, dict[tuple[int, int], int]] = {
        name: {} for name in ("weight", "throttlereadbps", "throttlewritebps", "throttlereadiops", "throttlewriteiops")
    }
    for settings in all_settings:
        values = {name: _quantity(name, getattr(settings, name)) for name in by_disk}
        if settings.devices is None:
            if any(value is not None for name, value in values.items() if name != "weight"):
                raise ValueError("a setting that throttles names no devices")
            weight = values["weight"] if values["weight"] is not None else weight
            continue
        for disk in _disks(settings.devices):
            for name, value in values.items():
                if value is not None:
                    by_disk[name][disk] = value
    rates = {
        name: [config.Throttle(major=major, minor=minor, rate=rate) for (major, minor), rate in disks.items()]
        for name, disks in by_disk.items()
    }
    return config.BlockIO(
        weight=weight,
        weight_device=[config.DiskWeight(major=m, minor=n, weight=w) for (m, n), w in by_disk["weight"].items()],
        throttle_read_bps_device=rates["throttlereadbps"],
        throttle_write_bps_device=rates["throttlewritebps"],
        throttle_read_iops_device=rates["throttlereadiops"],
        throttle_write_iops_device=rates["throttlewriteiops"],
    )


def _quantity(name: str, given: _Number) -> int | None:
    """A number with a unit of Kubernetes, such as ``50M`` or ``64Ki``. None if it is not set."""
    if given == "":
        return None
    match = _QUANTITY.fullmatch(str(given).strip())
    value = int(Decimal(match[1]) * _UNITS[match[2]]) if match else -1
    if not 0 <= value < _INT64_END:
        raise ValueError(f"{name} {given!r} is no quantity: use a number, as 50M or 64Ki")
    if name == "weight" and not _LOWEST_WEIGHT <= value <= _MAX_WEIGHT:
        raise ValueError(f"weight {given} is out of range: use {_LOWEST_WEIGHT} to {_MAX_WEIGHT}")
    return value


def _disks(patterns: Sequence[str]) -> Sequence[tuple[int, int]]:
    """The numbers of the disks that match. The kernel throttles disks, so partitions are left out."""
    found: dict[tuple[int, int], None] = {}
    for pattern in patterns:
        for path in sorted(glob.iglob(pattern)):  # noqa: PTH207 - a pattern may begin anywhere
            try:
                status = Path(path).stat()
            except OSError:
                continue  # missing, or a broken link
            disk = os.major(status.st_rdev), os.minor(status.st_rdev)
            if stat.S_ISBLK(status.st_mode) and not Path(f"/sys/dev/block/{disk[0]}:{disk[1]}/partition").exists():
                found[disk] = None
    if len(found) > _MAX_DISKS:
        raise ValueError(f"more than {_MAX_DISKS} disks match {', '.join(patterns)[:256]}")
    return list(found)
