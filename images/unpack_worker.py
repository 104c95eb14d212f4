"""The unpack worker: a short-lived process that writes one layer into a folder it cannot leave.

It reads the layer as the registry has it (plain, gzip or zstd tar) from standard input, and prints one JSON object: on
success what it unpacked, on failure ``error`` (``invalid``, ``limit``, ``space`` or ``internal``) and ``message``, in
hexadecimal digits. Before it looks at a single entry it takes a mount namespace of its own whose root is the layer's
folder, and gives up every capability that writing files does not need. Started as ``python -I -S``, so it knows nothing
of the agent's environment.

A worker is started for every layer: it imports only what cannot be done without (json, typing, contextlib and what they
bring along would take longer than unpacking a small layer).
"""

from __future__ import annotations

import ctypes
import errno
import gc
import hashlib
import io
import os
import resource
import sys

from host import libc
from images.layer_writer import LayerWriter
from images.tar_reader import LimitError, Stream, TarError, TarReader

TYPE_CHECKING = False  # as type checkers know it, without importing typing
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from typing_extensions import Buffer

MEMORY_LIMIT = 1 << 30
_READ = 1 << 20
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = range(0x184D2A50, 0x184D2A60)
_ZSTD_WINDOW = 128 << 20
_NICENESS = 5

# chown, dac_override, dac_read_search, fowner, fsetid, sys_admin (for trusted.overlay.opaque), mknod, setfcap
_KEPT_CAPABILITIES = sum(1 << number for number in (0, 1, 2, 3, 4, 21, 27, 31))
_DAMAGE = frozenset(("BadGzipFile", "IsalError", "ZstdError"))
_PR_SET_NO_NEW_PRIVS = 38
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 32, 1 << 12, 1 << 14, 1 << 18
_MNT_DETACH = 2
_CAPABILITY_VERSION = 0x20080522
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}


class Input(io.RawIOBase):
    """Standard input with its first bytes looked at and put back; a pipe's short reads are filled up."""

    def __init__(self) -> None:
        self._head = b""
        while len(self._head) < 4 and (chunk := os.read(0, _READ)):
            self._head += chunk
        self.start = self._head[:4]

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Buffer, /) -> int:
        """Read up to the size of ``buffer``."""
        view = memoryview(buffer).cast("B")
        if self._head:
            size = min(len(view), len(self._head))
            view[:size] = self._head[:size]
            self._head = self._head[size:]
            return size
        return os.readv(0, [view])


def decompressed(source: Input) -> Callable[[int], bytes]:
    """A read function for what is inside ``source``, told by its first bytes."""
    buffered = io.BufferedReader(source, _READ)
    plain: io.BufferedIOBase
    if source.start.startswith(_GZIP):
        try:
            from isal import igzip
        except ImportError:
            import gzip

            return gzip.GzipFile(fileobj=buffered, mode="rb").read1
        plain = igzip.IGzipFile(fileobj=buffered, mode="rb")  # type: ignore[no-untyped-call]  # isal has no types
        return plain.read1
    if source.start == _ZSTD or int.from_bytes(source.start, "little") in _ZSTD_SKIPPABLE:
        decompressor = _zstd().ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        plain = decompressor.stream_reader(buffered, read_size=_READ, read_across_frames=True)
        return plain.read
    return buffered.read1


def _zstd() -> Any:
    """What zstandard is made of, where it can be had alone: the package itself imports much that is not needed here."""
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


def confine(folder: str) -> None:
    """Make ``folder`` the root of this process, with nothing else of the host in sight."""
    libc.unshare(libc.CLONE_NEWNS)
    libc.mount("", "/", "", _MS_REC | _MS_PRIVATE, "")
    libc.mount(folder, folder, "", _MS_BIND, "")
    os.chdir(folder)
    safe = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    libc.mount("", ".", "", _MS_REMOUNT | _MS_BIND | safe, "")
    number = _SYS_PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, f"no pivot_root number known for {os.uname().machine}")
    libc.syscall(number, b".", b".")
    libc.umount(".", _MNT_DETACH)
    os.chdir("/")


def give_way() -> None:
    """Let the agent's calls and the node's containers go first."""
    os.nice(_NICENESS)
    try:
        with open("/proc/self/autogroup", "wb", 0) as group:  # sched(7), "autogroup feature"
            group.write(b"%d" % _NICENESS)
    except OSError:
        return  # a kernel without it, or one that lets nobody change it often


def held_capabilities() -> int:
    """The permitted set of this process."""
    with open("/proc/self/status", "rb") as status:
        return next(int(line.split()[1], 16) for line in status if line.startswith(b"CapPrm:"))


def give_up_privileges(held: int) -> None:
    """Keep of the ``held`` capabilities only those that writing a layer needs, and bound memory."""
    libc_handle = ctypes.CDLL(None, use_errno=True)
    kept = held & _KEPT_CAPABILITIES
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    low, high = kept & 0xFFFFFFFF, kept >> 32
    data = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)
    if libc_handle.capset(header, data) or libc_handle.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "capabilities could not be given up")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def unpack(folder: str, max_bytes: int, max_entries: int) -> dict[str, object]:
    """Confine the process to ``folder`` and unpack standard input there."""
    give_way()
    read = decompressed(Input())
    held = held_capabilities()
    confine(folder)
    give_up_privileges(held)
    os.umask(0)
    digest = hashlib.sha256()
    stream = Stream(read, digest.update, max_bytes)
    writer = LayerWriter(TarReader(stream), max_entries)
    writer.write_all()
    stream.drain()
    return {
        "diff_id": f"sha256:{digest.hexdigest()}",
        "used_bytes": writer.used_bytes,
        "used_inodes": writer.used_inodes,
        "entries": writer.entries,
        "opaque": writer.opaque,
        "implied": [path.hex() for path in writer.implied],
    }


def main() -> None:
    """``sys.argv``: …, the layer's folder, its limits in bytes and in entries."""
    gc.disable()  # nothing here makes cycles, and looking for some takes time
    folder, max_bytes, max_entries = sys.argv[-3:]
    try:
        result = unpack(folder, int(max_bytes), int(max_entries))
    except MemoryError:
        result = _failure("limit", f"unpacking it takes more than {MEMORY_LIMIT} bytes of memory")
    except Exception as error:
        result = _failure(*_reason(error))
    os.write(1, _as_json(result))
    os._exit(0)  # nothing is left to be done, so nothing needs to be taken apart first


def _reason(error: Exception) -> tuple[str, str]:
    """What kind of failure it is, and what to say of it."""
    if isinstance(error, LimitError):
        return "limit", str(error)
    if isinstance(error, TarError):
        return "invalid", str(error)
    if isinstance(error, EOFError):
        return "invalid", "its compressed stream is cut off"
    if type(error).__name__ in _DAMAGE or type(error).__module__ == "zlib":
        return "invalid", f"its compressed stream is damaged: {error}"
    if isinstance(error, OSError):
        return "space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "internal", str(error)
    return "internal", repr(error)


def _failure(kind: str, message: str) -> dict[str, object]:
    return {"error": kind, "message": message.encode("utf-8", "backslashreplace").hex()}


def _as_json(result: Mapping[str, object]) -> bytes:
    """The object, whose strings need no escapes."""
    fields = []
    for name, value in result.items():
        if isinstance(value, list):
            text = "[" + ",".join([f'"{item}"' for item in value]) + "]"
        else:
            text = f'"{value}"' if isinstance(value, str) else str(value).lower()
        fields.append(f'"{name}":{text}')
    return f"{{{','.join(fields)}}}".encode()
