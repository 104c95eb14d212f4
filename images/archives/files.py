"""Opens the files of an image archive: regular files only, and none outside of the archive's folder."""

from __future__ import annotations

import os
import stat
import tarfile
from pathlib import Path

from host import libc
from host.errors import InvalidArgumentError, NotFoundError

MAX_HEADER_BYTES = 1 << 20  # bytes of the header records of one member

_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def open_archive(path: Path) -> int:
    """Open the archive's file or folder and return the descriptor. Never waits for another process.

    Raises NotFoundError, and InvalidArgumentError if it cannot be read or is neither a file nor a folder.
    """
    try:
        descriptor = os.open(path, _FILE)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"image archive {path} does not exist") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InvalidArgumentError(f"image archive {path} cannot be read: {reason}") from error
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        os.close(descriptor)
        raise InvalidArgumentError(f"image archive {path} is neither a file nor a folder")
    return descriptor


def open_member(folder: int, name: str) -> tuple[int, int]:
    """Open the regular file ``name`` below the open ``folder``. Returns its descriptor and size.

    Links and ``..`` may lead through the folder, not out of it. Raises OSError, and ValueError for an invalid name or a
    file of another kind.
    """
    encoded = os.fsencode(name)
    if b"\0" in encoded:
        raise ValueError("holds a NUL")
    descriptor = libc.openat2(folder, encoded, _FILE, libc.RESOLVE_BENEATH | libc.RESOLVE_NO_MAGICLINKS)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ValueError("is no regular file")
    return descriptor, status.st_size


_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


class BoundedTarInfo(tarfile.TarInfo):
    """Refuses headers with which an archive could fill the memory: long records, and maps of sparse files."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in (*_EXTENDED, *_LONG) and self.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header is larger than {MAX_HEADER_BYTES} bytes")
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError(f"{self.name!r} is a sparse file: make the archive without --sparse")
        member: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]  # tarfile's own hook
        return member

    def _proc_gnusparse_10(self, *_: object) -> None:
        raise tarfile.ReadError(f"{self.name!r} is a sparse file: make the archive without --sparse")
