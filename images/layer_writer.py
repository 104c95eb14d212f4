"""Writing a layer's entries below the working folder, with whiteouts turned into overlayfs's form.

Runs in the unpack worker after it made the layer's folder its root, so that symbolic links, ``..`` and absolute names
cannot lead anywhere else. References: OCI image specification, "Image Layer Filesystem Changeset"; the kernel's
Documentation/filesystems/overlayfs.rst, "whiteouts and opaque directories".
"""

# Names are bytes, which pathlib does not take.
# ruff: noqa: PTH101, PTH102, PTH106, PTH108, PTH211
from __future__ import annotations

import errno
import os
import stat

from images.tar_reader import (
    BLOCK_DEVICE,
    CHARACTER_DEVICE,
    FIFO,
    FOLDER,
    HARD_LINK,
    REGULAR,
    SYMBOLIC_LINK,
    Entry,
    LimitError,
    TarError,
    TarReader,
)

TYPE_CHECKING = False  # as type checkers know it, without importing typing
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    T = TypeVar("T")

DISK_BLOCK = 4096
_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
_AUFS = b".wh..wh."
_OPAQUE_XATTR = b"trusted.overlay.opaque"
_SET_IDS = stat.S_ISUID | stat.S_ISGID
_DEVICE_KINDS = {CHARACTER_DEVICE: stat.S_IFCHR, BLOCK_DEVICE: stat.S_IFBLK, FIFO: stat.S_IFIFO}
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class LayerWriter:
    """Applies entries in order; a later entry of the same name replaces the earlier one.

    ``used_bytes`` (in blocks, as ``du`` counts) and ``used_inodes`` say what was made; ``implied`` are folders that no
    entry described, which take after those of the layers below; ``opaque`` is true if the layer hides everything below.
    """

    def __init__(self, reader: TarReader, max_entries: int) -> None:
        self._reader = reader
        self._max_entries = max_entries
        self._times: dict[bytes, int] = {}
        self._whiteouts: set[bytes] = set()
        self._groups_inherited = False
        self.entries = 0
        self.used_bytes = DISK_BLOCK
        self.used_inodes = 1
        self.opaque = False
        self.implied: dict[bytes, None] = {b"": None}

    def write_all(self) -> None:
        """Write every entry of the reader, then the times of the folders."""
        for entry in self._reader:
            self.entries += 1
            if self.entries > self._max_entries:
                raise LimitError(f"it holds more than {self._max_entries} entries (images.max_layer_entries)")
            try:
                self._write(entry)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENOMEM):
                    raise
                reason = error.strerror or str(error)
                raise TarError(f"{_shown(entry.name)} could not be made: {reason}") from error
        for path, mtime in self._times.items():
            os.utime(path or b".", ns=(mtime, mtime), follow_symlinks=False)

    def _write(self, entry: Entry) -> None:
        path = _clean(entry.name)
        base = path.rpartition(b"/")[2]
        if b".wh." in path:
            if _AUFS in path and not path.endswith(_OPAQUE):
                return  # AUFS's own book-keeping, which means nothing elsewhere
            if any(part.startswith(_WHITEOUT) for part in path.split(b"/")[:-1]):
                raise TarError(f"{_shown(entry.name)} lies below a whiteout")
            if base.startswith(_WHITEOUT):
                self._whiteout(entry, path, base)
                return
        if entry.kind == FOLDER:
            self._folder(entry, path)
            return
        if not path:
            raise TarError(f"{_shown(entry.name)} names the layer's root but is not a folder")
        if entry.kind == REGULAR:
            self._file(entry, path)
        elif entry.kind == HARD_LINK:
            self._hard_link(entry, path)
        elif entry.kind == SYMBOLIC_LINK:
            self._make(path, lambda: os.symlink(entry.link, path))
            self._set_owner(entry, path)
            self._set_xattrs(entry, path)
            os.utime(path, ns=(entry.mtime, entry.mtime), follow_symlinks=False)
            self._count(0)
        else:
            self._special(entry, path)

    def _file(self, entry: Entry, path: bytes) -> None:
        try:
            descriptor = os.open(path, _NEW_FILE, entry.mode)
        except (FileNotFoundError, FileExistsError, NotADirectoryError):
            descriptor = self._make(path, lambda: os.open(path, _NEW_FILE, entry.mode))
        try:
            for offset, size in ((0, entry.size),) if entry.regions is None else entry.regions:
                if offset:
                    os.lseek(descriptor, offset, os.SEEK_SET)
                for piece in self._reader.data(size):
                    written = os.write(descriptor, piece)
                    while written < len(piece):
                        written += os.write(descriptor, piece[written:])
            if entry.regions is not None:
                os.truncate(descriptor, entry.real_size)
            if entry.uid or entry.gid or self._groups_inherited:
                os.fchown(descriptor, entry.uid, entry.gid)
                if entry.mode & _SET_IDS:
                    os.fchmod(descriptor, entry.mode)
            if entry.xattrs:
                self._set_xattrs(entry, descriptor)
            os.utime(descriptor, ns=(entry.mtime, entry.mtime))
        finally:
            os.close(descriptor)
        self._count(entry.size)

    def _folder(self, entry: Entry, path: bytes) -> None:
        made = False
        if path:
            made = self._make_folder(path, entry.mode)
        target = path or b"."
        self._set_owner(entry, target)
        os.chmod(target, entry.mode)
        self._set_xattrs(entry, target)
        self._times[path] = entry.mtime
        self.implied.pop(path, None)
        if entry.mode & stat.S_ISGID:
            self._groups_inherited = True
        if made:
            self._count(DISK_BLOCK)

    def _make_folder(self, path: bytes, mode: int) -> bool:
        """Make the folder unless there is one; whatever else is there goes. A whited-out one hides what is below."""
        try:
            os.mkdir(path, mode)
            return True
        except (FileNotFoundError, NotADirectoryError):
            self._make_parents(path)
        except FileExistsError:
            if stat.S_ISDIR(os.lstat(path).st_mode):
                return False
            hidden = path in self._whiteouts
            self._clear(path)
            os.mkdir(path, mode)
            if hidden:
                os.setxattr(path, _OPAQUE_XATTR, b"y")
            return True
        os.mkdir(path, mode)
        return True

    def _hard_link(self, entry: Entry, path: bytes) -> None:
        target = _clean(entry.link)
        if target == path:
            return
        try:
            self._make(path, lambda: os.link(target, path, follow_symlinks=False))
        except FileNotFoundError as error:
            raise TarError(
                f"{_shown(entry.name)} is a hard link to {_shown(entry.link)}, which is not in this layer"
            ) from error

    def _special(self, entry: Entry, path: bytes) -> None:
        mode = _DEVICE_KINDS[entry.kind] | entry.mode
        self._make(path, lambda: os.mknod(path, mode, os.makedev(*entry.device)))
        self._set_owner(entry, path)
        if entry.mode & _SET_IDS:
            os.chmod(path, entry.mode)
        self._set_xattrs(entry, path)
        os.utime(path, ns=(entry.mtime, entry.mtime), follow_symlinks=False)
        self._count(0)

    def _whiteout(self, entry: Entry, path: bytes, base: bytes) -> None:
        folder = path[: -len(base)].rstrip(b"/")
        if base == _OPAQUE:
            if not folder:
                self.opaque = True  # overlayfs reads no such mark on a layer's root: the layers below are left out
                return
            if not _is_folder(folder):
                self._make_folder(folder, 0o755)
                self.implied[folder] = None
                self._count(DISK_BLOCK)
            os.setxattr(folder, _OPAQUE_XATTR, b"y")
            return
        hidden = base[len(_WHITEOUT) :]
        if hidden in (b"", b".", b".."):
            raise TarError(f"{_shown(entry.name)} is a whiteout of {_shown(hidden)}")
        name = folder + b"/" + hidden if folder else hidden
        try:
            self._make_whiteout(name)
        except FileExistsError:
            # What this layer itself holds under the name stays; only what is below it is hidden.
            if _is_folder(name):
                os.setxattr(name, _OPAQUE_XATTR, b"y")
            return
        self._whiteouts.add(name)
        self._count(0)

    def _make_whiteout(self, name: bytes) -> None:
        try:
            os.mknod(name, stat.S_IFCHR, 0)
        except (FileNotFoundError, NotADirectoryError):
            self._make_parents(name)
            os.mknod(name, stat.S_IFCHR, 0)

    def _make(self, path: bytes, make: Callable[[], T]) -> T:
        """Call ``make``; if a folder is missing or something is in the way, see to that and call it again."""
        try:
            return make()
        except (FileNotFoundError, NotADirectoryError):
            if b"/" not in path:
                raise
            self._make_parents(path)
        except FileExistsError:
            self._clear(path)
        return make()

    def _make_parents(self, path: bytes) -> None:
        """Make the missing folders on the way to ``path``, as no entry describes them (yet)."""
        missing: list[bytes] = []
        folder = path.rpartition(b"/")[0]
        while folder and not os.path.lexists(folder):
            missing.append(folder)
            folder = folder.rpartition(b"/")[0]
        # A whiteout on the way gives room: the folder that replaces it hides what is below.
        if folder in self._whiteouts:
            missing.append(folder)
        for parent in reversed(missing):
            if self._make_folder(parent, 0o755):
                self.implied[parent] = None
                self._count(DISK_BLOCK)

    def _clear(self, path: bytes) -> None:
        """Remove whatever is at ``path``."""
        self._whiteouts.discard(path)
        pending = [path]
        while pending:
            current = pending[-1]
            status = os.lstat(current)
            if stat.S_ISDIR(status.st_mode):
                with os.scandir(current) as listing:
                    children = [entry.path for entry in listing]
                if children:
                    pending.extend(children)
                    continue
                os.rmdir(current)
                self._times.pop(current, None)
                self.implied.pop(current, None)
                self._uncount(DISK_BLOCK)
            else:
                os.unlink(current)
                if status.st_nlink == 1:
                    self._uncount(status.st_size if stat.S_ISREG(status.st_mode) else 0)
            pending.pop()

    def _set_owner(self, entry: Entry, path: bytes) -> None:
        if entry.uid or entry.gid or self._groups_inherited:
            os.chown(path, entry.uid, entry.gid, follow_symlinks=False)

    def _set_xattrs(self, entry: Entry, target: bytes | int) -> None:
        for name, value in (entry.xattrs or {}).items():
            if name != b"security.capability" and (not name.startswith(b"user.") or name.startswith(b"user.overlay.")):
                continue  # trusted.* and the like are the host's own: overlayfs would obey them
            try:
                os.setxattr(target, name, value, follow_symlinks=isinstance(target, int))
            except OSError as error:
                if error.errno not in (errno.ENOTSUP, errno.EPERM):
                    raise

    def _count(self, size: int) -> None:
        self.used_inodes += 1
        self.used_bytes += _blocks(size)

    def _uncount(self, size: int) -> None:
        self.used_inodes -= 1
        self.used_bytes -= _blocks(size)


def _blocks(size: int) -> int:
    return -(-size // DISK_BLOCK) * DISK_BLOCK


def _is_folder(path: bytes) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def _clean(name: bytes) -> bytes:
    """``name`` relative to the root, without empty and ``.`` parts; TarError for one that climbs with ``..``."""
    if not name:
        raise TarError("an entry has no name")
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise TarError(f"{_shown(name)} climbs out of its folder with '..'")
    return b"/".join(parts)


def _shown(name: bytes) -> str:
    text = name.decode("utf-8", "backslashreplace")
    return repr(text if len(text) <= 200 else text[:200] + "…")
