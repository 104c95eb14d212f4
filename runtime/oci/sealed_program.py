"""A program's copy in sealed memory, which crun executes directly instead of copying itself first.

A container must not overwrite the node's crun through /proc/self/exe. So crun restarts from a protected copy at each
call, unless it runs from a memory file that is sealed against writing: see memfd_create(2), F_ADD_SEALS.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import threading
from pathlib import Path

_MFD_EXEC = 0x10  # required since Linux 6.3, unknown before
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE

_PATIENCE_SECONDS = 1.0

_log = logging.getLogger("podkeel.runtime")

_Version = tuple[int, int, int, int]


class SealedProgram:
    """The copy, at the path ``link`` while this process runs. It is made again when the original is replaced."""

    def __init__(self, original: Path, link: Path) -> None:
        self._original = original
        self._link = link
        self._descriptor = -1
        self._version: _Version | None = None
        self._checking = threading.Lock()
        self._unanswered = False

    def path(self) -> str:
        """The path to execute. Blocks; any thread may call it.

        If an earlier call hangs, because the file system of the original does not answer, the copy is used as it is.

        Raises OSError: the original is missing or cannot be copied, or (ETXTBSY) a process has the copy open for
        writing. A container can open it through an OCI runtime inside the container. It cannot write anything, but the
        kernel does not execute a file that is open for writing.
        """
        if not self._checking.acquire(timeout=0 if self._unanswered else _PATIENCE_SECONDS):
            if not self._unanswered:
                self._unanswered = True
                _log.warning("program %s: its file system does not answer: using the copy in memory", self._original)
            return str(self._link)
        try:
            return self._checked_path()
        finally:
            self._unanswered = False
            self._checking.release()

    def _checked_path(self) -> str:
        status = self._original.stat()
        version = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if version != self._version:
            self._copy()
            self._version = version
        self._require_no_writer()
        return str(self._link)

    def _require_no_writer(self) -> None:
        # If a process opens it for writing during the lease, the kernel sends a signal: by default SIGIO, which
        # would end this process. This signal is ignored instead. The end of a lease restores the default.
        fcntl.fcntl(self._descriptor, fcntl.F_SETSIG, signal.SIGURG)
        try:  # the kernel grants a read lease only if no process has the file open for writing: fcntl(2)
            fcntl.fcntl(self._descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            fcntl.fcntl(self._descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except BlockingIOError as error:
            raise OSError(errno.ETXTBSY, os.strerror(errno.ETXTBSY), str(self._link)) from error

    def _copy(self) -> None:
        descriptor = _sealed_copy(self._original)
        try:
            new = self._link.with_name(f"{self._link.name}.new")
            new.unlink(missing_ok=True)
            self._link.parent.mkdir(mode=0o700, exist_ok=True)
            new.symlink_to(f"/proc/{os.getpid()}/fd/{descriptor}")
            new.rename(self._link)
        except BaseException:
            os.close(descriptor)
            raise
        self.close()
        self._descriptor = descriptor

    def close(self) -> None:
        """Free the memory. Programs that run from it continue."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _sealed_copy(original: Path) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        descriptor = os.memfd_create(original.name, flags | _MFD_EXEC)
    except OSError:
        descriptor = os.memfd_create(original.name, flags)
    try:
        with original.open("rb") as source:
            while os.sendfile(descriptor, source.fileno(), None, 1 << 24):
                pass
        os.fchmod(descriptor, 0o555)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
