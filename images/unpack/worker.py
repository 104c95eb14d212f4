"""The unpack worker: a short-lived process that writes one layer into a folder that it cannot leave.

It reads the layer from standard input as the registry sends it (plain, gzip or zstd tar), and prints one JSON object:
on success what it unpacked, on failure ``error`` (``invalid``, ``limit``, ``space``, ``node`` or ``internal``) and
``message`` in hexadecimal digits. A confined child reads the layer (``images/unpack/confinement.py``). It is started
with ``python -I -S``, so that the agent's environment does not affect it.

A worker is started for every layer, so it imports only the necessary modules: importing json, typing and contextlib
would take longer than unpacking a small layer.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import io
import os
import stat
import sys

from images.unpack.confinement import Limits, run_confined
from images.unpack.tar.headers import LimitError, TarError
from images.unpack.tar.reader import Stream, TarReader
from images.unpack.tar.zstd_frames import ZstdFrames, is_zstd
from images.unpack.writing.device_places import Device
from images.unpack.writing.layer_writer import LayerWriter

TYPE_CHECKING = False  # type checkers treat this name as true; importing typing is slow
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from typing_extensions import Buffer

    from images.unpack.writing.helper_process import HelperProcess

_SIGKILL = 9  # importing the module signal takes longer than unpacking a small layer
_READ = 1 << 20
_GZIP_READ = 512 << 10
_GZIP = b"\x1f\x8b"
_MAX_MARK_LENGTH = 10
_OTHERS = {b"\xfd7zXZ\0": "xz", b"BZh91AY&SY": "bzip2", b"\x04\x22\x4d\x18": "lz4"}
_NO_PROCESS = "the node has no more processes: end some, or raise kernel.pid_max, kernel.threads-max or TasksMax="
_DAMAGE = frozenset(("BadGzipFile", "IsalError", "ZstdError"))

MEMORY_LIMIT = 1 << 30
ZSTD_WINDOW = 1 << 31  # the maximum of zstd --long=31; only frames that need it use the memory
# The maximum size of names in a report, and the size added for each name.
MAX_REPORTED = 8 << 20
_ITEM_BYTES = 64


class Input(io.RawIOBase):
    """Standard input. ``start`` holds its first bytes, which are read again. A pipe's short reads are filled up."""

    def __init__(self) -> None:
        self._head = b""
        while len(self._head) < _MAX_MARK_LENGTH and (chunk := os.read(0, _READ)):
            self._head += chunk
        self.start = self._head[:_MAX_MARK_LENGTH]
        self.frames = ZstdFrames() if is_zstd(self.start) else None

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Buffer, /) -> int:
        """Read up to the size of ``buffer``."""
        view = memoryview(buffer).cast("B")
        if self._head:
            size = min(len(view), len(self._head))
            view[:size] = self._head[:size]
            self._head = self._head[size:]
        else:
            size = os.readv(0, [view])
        if self.frames is not None:
            self.frames.feed(view[:size])
        return size


def decompressed(source: Input) -> Callable[[int], bytes]:
    """A function that reads the decompressed content of ``source``, whose first bytes show its format.

    The function raises TarError for damaged data.
    """
    buffered = io.BufferedReader(source, _READ)
    plain: io.BufferedIOBase
    if source.start.startswith(_GZIP):
        try:  # the class behind isal.igzip, which itself imports much that is not needed here
            from isal.isal_zlib import _GzipReader
        except ImportError:
            import gzip

            return _checked(gzip.GzipFile(fileobj=buffered, mode="rb").read1)
        reader: Any = _GzipReader(buffered, _GZIP_READ)
        return _checked(io.BufferedReader(reader).read1)
    if source.frames is not None:
        decompressor = zstd_module().ZstdDecompressor(max_window_size=ZSTD_WINDOW)
        plain = decompressor.stream_reader(buffered, read_size=_READ, read_across_frames=True)
        return _whole(_checked(plain.read), source.frames)
    for mark, name in _OTHERS.items():
        if source.start.startswith(mark):
            raise TarError(f"it is compressed with {name}: layers may be compressed with gzip or zstd")
    return buffered.read1


def _checked(read: Callable[[int], bytes]) -> Callable[[int], bytes]:
    """Wrap ``read`` so that errors of decompressors become TarError and LimitError.

    Errors of files are raised as they are, though errors of some decompressors are subclasses of them.
    """

    def checked(size: int) -> bytes:
        try:
            return read(size)
        except EOFError as error:
            raise TarError("its compressed stream is cut off") from error
        except Exception as error:
            if "too much memory" in str(error) or "Allocation error" in str(error):  # zstd, for a frame's window
                raise LimitError(
                    f"its zstd frames need a window of more than {ZSTD_WINDOW} bytes (zstd --long=31)"
                ) from error
            if isinstance(error, ImportError):  # isal fails to import its error class in the confined process
                raise TarError("its compressed stream is damaged") from error
            if type(error).__name__ in _DAMAGE or type(error).__module__ == "zlib":
                raise TarError(f"its compressed stream is damaged: {error}") from error
            raise

    return checked


def _whole(read: Callable[[int], bytes], frames: ZstdFrames) -> Callable[[int], bytes]:
    """Wrap ``read`` of a zstd stream, which takes the end of its input for that of a frame."""

    def checked(size: int) -> bytes:
        data = read(size)
        if not data and not frames.complete:
            raise TarError("its compressed stream is cut off")
        return data

    return checked


def zstd_module() -> Any:
    """The C module of zstandard alone if possible, because the package imports much that is not needed here."""
    from importlib.machinery import PathFinder

    package = PathFinder.find_spec("zstandard")
    places = package.submodule_search_locations if package is not None else None
    compiled = PathFinder.find_spec("backend_c", places) if places else None
    try:
        if compiled is None or compiled.loader is None:
            import zstandard

            return zstandard
        module = compiled.loader.create_module(compiled)
        if module is not None:
            compiled.loader.exec_module(module)
        return module
    except ImportError as error:
        raise TarError("it is compressed with zstd, which needs the Python package zstandard") from error


def unpack(
    read: Callable[[int], bytes], max_bytes: int, max_entries: int, helper: HelperProcess | None = None
) -> dict[str, object]:
    """Unpack the tar of ``read`` into the working folder. Returns the result, and what the agent has to make."""
    digest = hashlib.sha256()
    stream = Stream(read, digest.update, max_bytes)
    writer = _writer(TarReader(stream), max_entries, helper)
    writer.write_all()
    stream.drain()
    if helper is not None:
        helper.end()
    names = [*writer.implied, *writer.opaque_folders, *writer.hiding]
    names += [path for device in writer.devices for path in device.paths]
    if sum(map(len, names)) + _ITEM_BYTES * len(names) > MAX_REPORTED:
        raise LimitError(
            "folders without an entry, opaque folders, folders with whiteouts and device nodes have names of more than "
            f"{MAX_REPORTED} bytes"
        )
    return {
        "diff_id": f"sha256:{digest.hexdigest()}",
        "used_bytes": writer.used_bytes,
        "used_inodes": writer.used_inodes,
        "entries": writer.entries,
        "opaque": writer.opaque,
        "implied": [path.hex() for path in writer.implied],
        "hiding": [path.hex() for path in writer.hiding],
        "opaque_folders": [path.hex() for path in writer.opaque_folders],
        "devices": [_numbers(device) for device in writer.devices],
    }


def _writer(reader: TarReader, max_entries: int, helper: HelperProcess | None) -> LayerWriter:
    if helper is None:
        return LayerWriter(reader, max_entries)
    from images.unpack.writing.helped_writer import HelpedLayerWriter

    return HelpedLayerWriter(reader, max_entries, helper)


def _numbers(device: Device) -> list[object]:
    """The device in the format of ``images/unpack/special_files.py``."""
    block = stat.S_ISBLK(device.mode)
    names = [path.hex() for path in device.paths]
    return [block, stat.S_IMODE(device.mode), *device.device, device.uid, device.gid, device.mtime, names]


def main(work: Callable[..., dict[str, object]] = unpack) -> None:
    """Run with ``sys.argv``: …, the number of processes (1 or 2), the layer's folder, limits in bytes, entries and
    seconds, the filter in hexadecimal.
    """
    gc.disable()  # this process makes no reference cycles, and searching for some takes time
    processes, folder, max_bytes, max_entries, seconds, seccomp_filter = sys.argv[-6:]
    helper = _helper() if processes == "2" else None

    def confined() -> None:
        try:
            result = work(read, int(max_bytes), int(max_entries), *([helper] if helper is not None else ()))
        except MemoryError:
            result = _failure("limit", f"unpacking it takes more than {limits.memory_bytes} bytes of memory")
        except Exception as error:
            result = _failure(*_reason(error))
        _write(_as_json(result))

    def failed(error: Exception) -> None:
        _write(_as_json(_failure(*_reason(error))))

    try:
        source = Input()
        read = decompressed(source)
        memory = MEMORY_LIMIT + (ZSTD_WINDOW if source.frames is not None else 0)
        limits = Limits(memory, int(seconds), int(max_bytes))
        ended = run_confined(folder, bytes.fromhex(seccomp_filter), limits, confined, failed, helper=helper)
    except Exception as error:
        failed(error)
    else:
        if ended.status == -_SIGKILL:
            message = "the process that unpacks it was killed: the node may be short of memory"
            if ended.seconds >= limits.seconds - 1:  # the kernel and wait4(2) measure it differently
                message = f"unpacking it takes more than {seconds} s of processor time (images.max_layer_seconds)"
            _write(_as_json(_failure("limit", message)))
        elif ended.status:
            sys.exit(f"the confined process ended with status {ended.status}")
    os._exit(0)  # without Python's clean-up, which is not needed


def _helper() -> HelperProcess:
    from images.unpack.writing import helped_writer  # noqa: F401 - the confined process finds no modules
    from images.unpack.writing.helper_process import HelperProcess

    return HelperProcess()


def _write(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]


def _reason(error: Exception) -> tuple[str, str]:
    """The kind of failure, and its message."""
    if isinstance(error, LimitError):
        return "limit", str(error)
    if isinstance(error, TarError):
        return "invalid", str(error)
    if isinstance(error, OSError):
        if error.errno == errno.EUSERS:
            return "node", error.strerror or str(error)
        if error.errno == errno.EAGAIN:
            return "node", _NO_PROCESS
        return "space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "internal", str(error)
    return "internal", repr(error)


def _failure(kind: str, message: str) -> dict[str, object]:
    return {"error": kind, "message": message.encode("utf-8", "backslashreplace").hex()}


def _as_json(result: Mapping[str, object]) -> bytes:
    """``result`` as a JSON object. Its strings must need no escapes."""
    fields = []
    for name, value in result.items():
        fields.append(f'"{name}":{_value(value)}')
    return f"{{{','.join(fields)}}}".encode()


def _value(value: object) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_value, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value).lower()
