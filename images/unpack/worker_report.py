"""Decodes and checks the report of an unpack worker, because a layer may have taken control of the worker."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from host import processes
from host.errors import InvalidArgumentError, LimitError, NodeLimitError, NoSpaceError, PodkeelError
from images.unpack.special_files import DeviceNode
from images.unpack.writing.layer_root import MAX_NAME_LENGTH, MAX_PARTS

# More than any layer has; the sum over all layers still fits into uint64.
_MAX_BYTES = 1 << 50
_MAX_INODES = 1 << 32


class Unpacked(msgspec.Struct, frozen=True):
    """The result of unpacking a layer: its digests, and its usage on disk in bytes and inodes.

    ``implied`` are the folders (relative paths as bytes) without an entry, ``hiding`` those with whiteouts in them. An
    ``opaque`` layer hides all layers below it.
    """

    diff_id: str
    blob_digest: str
    blob_bytes: int
    used_bytes: int
    used_inodes: int
    opaque: bool
    implied: tuple[bytes, ...]
    hiding: tuple[bytes, ...]


class WorkerReport(msgspec.Struct):
    """The JSON object of ``images/unpack/worker.py``. Names are in hexadecimal digits."""

    error: str = ""
    message: str = ""
    diff_id: str = ""
    used_bytes: int = 0
    used_inodes: int = 0
    entries: int = 0
    opaque: bool = False
    implied: list[str] = []
    hiding: list[str] = []
    opaque_folders: list[str] = []
    devices: list[DeviceNode] = []

    def names(self) -> Iterator[str]:
        """All paths in the report."""
        yield from self.implied
        yield from self.hiding
        yield from self.opaque_folders
        for device in self.devices:
            yield from device.names


def decode_report(completed: processes.Completed, subject: str) -> WorkerReport:
    """The report of a worker that succeeded.

    Raises InvalidArgumentError for a broken layer, LimitError for one over the limits or a full disk, NodeLimitError
    if no process or namespace could be made. Raises PodkeelError if the worker failed or its report is invalid.
    """
    try:
        report = msgspec.json.decode(completed.stdout, type=WorkerReport)
        message = bytes.fromhex(report.message).decode()
        valid = _is_valid(report)
    except (ValueError, RecursionError):
        report, valid = WorkerReport(), False
    if completed.status != 0 or not valid:
        output = completed.stderr.decode(errors="replace").strip()[-500:]
        raise PodkeelError(
            f"{subject} could not be unpacked: the worker ended with status {completed.status}: {output or 'no report'}"
        )
    match report.error:
        case "":
            return report
        case "invalid":
            raise InvalidArgumentError(f"{subject} is broken: {message}")
        case "limit":
            raise LimitError(f"{subject} is over the limits: {message}")
        case "node":
            raise NodeLimitError(f"{subject} could not be unpacked: {message}")
        case "space":
            raise NoSpaceError(f"{subject} could not be unpacked, the disk is full: {message}")
    raise PodkeelError(f"{subject} could not be unpacked: {message}")


def _is_valid(report: WorkerReport) -> bool:
    if not (0 <= report.used_bytes <= _MAX_BYTES and 0 <= report.used_inodes <= _MAX_INODES):
        return False
    return all(device.names for device in report.devices) and all(map(_is_path, report.names()))


def _is_path(name: str) -> bool:
    path = bytes.fromhex(name)
    return len(path) <= MAX_NAME_LENGTH and path.count(b"/") < MAX_PARTS and b"\0" not in path
