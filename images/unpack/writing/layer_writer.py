"""Writes the entries of a layer into the working folder, and converts whiteouts to overlayfs's form.

Runs in the unpack worker, whose root is the layer's folder, so that symbolic links, ``..`` and absolute names cannot
lead outside. The worker has no right to make device nodes and to mark opaque folders: it lists them, and the agent
makes them (``images/unpack/special_files.py``).

References: OCI image specification, "Image Layer Filesystem Changeset"; the kernel's
Documentation/filesystems/overlayfs.rst, "whiteouts and opaque directories".
"""

# Names are bytes, which pathlib does not take.
# ruff: noqa: PTH101, PTH102, PTH106, PTH108, PTH208, PTH211
from __future__ import annotations

import errno
import os
import stat

from images.unpack.tar.headers import (
    FIFO,
    FOLDER,
    HARD_LINK,
    REGULAR,
    SYMBOLIC_LINK,
    Entry,
    LimitError,
    TarError,
    shown,
)
from images.unpack.writing.attributes import DEFAULT_ACL, set_attributes
from images.unpack.writing.device_places import Device, DevicePlaces
from images.unpack.writing.layer_root import LayerRoot, clean, is_clean
from images.unpack.writing.small_file import NEW_FILE, SET_IDS, make_file
from images.unpack.writing.whiteouts import WHITED_OUT, has_only_whiteouts, is_hidden

TYPE_CHECKING = False  # type checkers treat this name as true; importing typing is slow
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from images.unpack.tar.reader import TarReader
    from images.unpack.writing.small_file import SmallFile

    T = TypeVar("T")

DISK_BLOCK = 4096
_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
_AUFS = b".wh..wh."
_AUFS_LINKED = b".wh..wh.plnk"  # the folder of files with several names
_LAST_NANOSECOND = (1 << 63) - 1


class LayerWriter:
    """Applies entries in order. A later entry of the same name replaces the earlier one.

    ``used_bytes`` (in blocks, as in ``du``) and ``used_inodes`` are the usage on disk. ``implied`` are folders without
    an entry, which get the metadata of the layers below. ``opaque`` is true if the layer hides everything below.
    ``opaque_folders`` and ``devices`` are for the agent to make. ``hiding`` are folders with whiteouts in them.
    """

    def __init__(self, reader: TarReader, max_entries: int) -> None:
        self._reader = reader
        self._max_entries = max_entries
        self._root = LayerRoot()
        self._times: dict[bytes, int] = {}
        self._default_acls: dict[bytes, Entry] = {}
        self._groups_inherited = False
        self._has_whiteouts = False
        self._places = DevicePlaces(self._root)
        self.devices: list[Device] = []
        self.entries = 0
        self.used_bytes = DISK_BLOCK
        self.used_inodes = 1
        self.opaque = False
        self.opaque_folders: dict[bytes, None] = {}
        self.hiding: dict[bytes, None] = {}
        self.implied: dict[bytes, None] = {b"": None}

    def write_all(self) -> None:
        """Write every entry of the reader, then set the times and the default ACLs of the folders."""
        for entry in self._reader:
            self.entries += 1
            if self.entries > self._max_entries:
                raise LimitError(f"it holds more than {self._max_entries} entries (images.max_layer_entries)")
            try:
                self._apply(entry)
            except (OSError, ValueError, OverflowError) as error:
                raise named(error, entry.name) from None
        self._settle()
        if self._root.kind(_AUFS_LINKED):
            self._clear(_AUFS_LINKED)
        self.devices = self._places.take()
        opaque = [path for path in self.opaque_folders if self._root.kind(path) == stat.S_IFDIR]
        self.opaque_folders = dict.fromkeys(self._root.resolve(path)[0] for path in opaque)
        for path, entry in self._default_acls.items():
            if self._root.kind(path) == stat.S_IFDIR:  # a link in the path may have been replaced since
                set_attributes(entry, self._root.near(path), (DEFAULT_ACL,))
        for path, mtime in self._times.items():
            if self._root.kind(path) == stat.S_IFDIR:
                os.utime(self._root.near(path), ns=(mtime, mtime), follow_symlinks=False)

    def _apply(self, entry: Entry) -> None:
        """Write one entry."""
        if entry.kind != REGULAR or not self._plain_file(entry):
            self._write(entry)

    def _settle(self) -> None:
        """Wait until all entries are written."""

    def _write(self, entry: Entry) -> None:
        path = clean(entry.name)
        base = path.rpartition(b"/")[2]
        if b".wh." in path:
            if _AUFS in path and not path.endswith(_OPAQUE):
                # AUFS's metadata is not needed, but hard links in the layer may link to these files.
                if entry.kind == REGULAR and path.startswith(_AUFS_LINKED + b"/"):
                    self._file(entry, _AUFS_LINKED + b"/" + base)
                return
            if any(part.startswith(_WHITEOUT) for part in path.split(b"/")[:-1]):
                raise TarError(f"{shown(entry.name)} is below a whiteout")
            if base.startswith(_WHITEOUT):
                self._whiteout(entry, path, base)
                return
        if entry.kind == FOLDER:
            self._folder(entry, path)
            return
        if not path:
            raise TarError(f"{shown(entry.name)} names the layer's root but is not a folder")
        if entry.kind == REGULAR:
            self._file(entry, path)
        elif entry.kind == HARD_LINK:
            self._hard_link(entry, path)
        elif entry.kind == SYMBOLIC_LINK:
            self._make(path, lambda name: os.symlink(entry.link, name))
            self._describe(entry, self._root.near(path))
        elif entry.kind == FIFO:
            self._make(path, lambda name: os.mkfifo(name, entry.mode))
            self._describe(entry, self._root.near(path))
        else:
            self._device(entry, path)

    def _plain_file(self, entry: Entry) -> bool:
        """Write a small new file in few system calls. Returns False, without any change, if it is of another kind."""
        name = entry.name.removeprefix(b"./")
        if not is_clean(name) or b".wh." in name or self._root.away:
            return False
        file = self._small_file(entry, name)
        if file is None:
            return False
        try:
            make_file(file)
        except (FileNotFoundError, FileExistsError, NotADirectoryError):
            self._make(name, lambda _: make_file(file))
        self._count(entry.size)
        return True

    def _small_file(self, entry: Entry, path: bytes) -> SmallFile | None:
        """All of a file, if it has been read; None for any other, of which nothing is taken."""
        if entry.xattrs or entry.regions is not None:
            return None
        content = self._reader.whole(entry)
        if content is None:
            return None
        owner = (entry.uid, entry.gid) if entry.uid or entry.gid or self._groups_inherited else None
        return path, content, entry.mode, mtime_of(entry), owner

    def _describe(self, entry: Entry, name: bytes) -> None:
        """Set owner, mode and time of a file that is neither regular nor a folder, and count it."""
        self._set_owner(entry, name)
        if entry.kind != SYMBOLIC_LINK and entry.mode & SET_IDS:
            os.chmod(name, entry.mode)
        set_attributes(entry, name)
        mtime = mtime_of(entry)
        os.utime(name, ns=(mtime, mtime), follow_symlinks=False)
        self._count(0)

    def _file(self, entry: Entry, path: bytes) -> None:
        try:
            descriptor = os.open(self._root.near(path), NEW_FILE, entry.mode)
        except (FileNotFoundError, FileExistsError, NotADirectoryError):
            descriptor = self._make(path, lambda name: os.open(name, NEW_FILE, entry.mode))
        self._fill(entry, descriptor)

    def _fill(self, entry: Entry, descriptor: int) -> None:
        """Give a new file its content and all that describes it, close it and count it."""
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
                if entry.mode & SET_IDS:
                    os.fchmod(descriptor, entry.mode)
            if entry.xattrs:
                set_attributes(entry, descriptor)
            mtime = mtime_of(entry)
            os.utime(descriptor, ns=(mtime, mtime))
        finally:
            os.close(descriptor)
        self._count(entry.size)

    def _folder(self, entry: Entry, path: bytes) -> None:
        made = bool(path) and self._make_folder(path, entry.mode)
        self._describe_folder(entry, path)
        if made:
            self._count(DISK_BLOCK)

    def _describe_folder(self, entry: Entry, path: bytes) -> None:
        target = self._root.near(path)
        self._set_owner(entry, target)
        os.chmod(target, entry.mode)
        set_attributes(entry, target)
        self._default_acls.pop(path, None)
        if entry.xattrs and DEFAULT_ACL in entry.xattrs:
            self._default_acls[path] = entry
        self._times[path] = mtime_of(entry)
        self.implied.pop(path, None)
        if entry.mode & stat.S_ISGID:
            self._groups_inherited = True

    def _make_folder(self, path: bytes, mode: int) -> bool:
        """Make the folder unless it exists. Removes anything else at this path; after a whiteout the folder is opaque.

        Returns whether it was made.
        """
        try:
            os.mkdir(self._root.near(path), mode)
            return True
        except (FileNotFoundError, NotADirectoryError):
            self._make_parents(path)
        except FileExistsError:
            if self._root.kind(path) == stat.S_IFDIR:
                return False
            hidden = self._root.kind(path) == WHITED_OUT
            self._clear(path)
            os.mkdir(self._root.near(path), mode)
            if hidden:
                self.opaque_folders[path] = None
            return True
        os.mkdir(self._root.near(path), mode)
        return True

    def _hard_link(self, entry: Entry, path: bytes) -> None:
        target = clean(entry.link)
        if target.startswith(_AUFS_LINKED + b"/"):
            target = _AUFS_LINKED + target[target.rindex(b"/") :]
        missing = TarError(f"{shown(entry.name)} is a hard link to {shown(entry.link)}, which is not in this layer")
        if target == path or self._has_whiteouts:
            if self._root.kind(target) in (0, WHITED_OUT):
                raise missing
            if target == path:
                return
        try:
            self._make(path, lambda name: self._root.link(target, path))
        except FileNotFoundError as error:
            raise missing from error
        self._places.linked(path)

    def _device(self, entry: Entry, path: bytes) -> None:
        descriptor = self._make(path, lambda name: os.open(name, NEW_FILE, 0))
        try:
            self._places.fill(descriptor, path, Device(entry, mtime_of(entry)))
        finally:
            os.close(descriptor)
        self._count(0)

    def _whiteout(self, entry: Entry, path: bytes, base: bytes) -> None:
        folder = self._root.resolve(path[: -len(base)])[0]
        if base == _OPAQUE:
            self._make_opaque(entry, folder)
            return
        hidden = base[len(_WHITEOUT) :]
        if hidden in (b"", b".", b".."):
            raise TarError(f"{shown(entry.name)} is a whiteout of {shown(hidden)}")
        name = folder + b"/" + hidden if folder else hidden
        self._has_whiteouts = True
        try:
            os.mknod(self._root.near(name), stat.S_IFCHR, 0)
        except (FileNotFoundError, NotADirectoryError):
            if is_hidden(self._root, folder):
                return  # some tools write whiteouts of a folder and of the files in it
            self._make_parents(name)
            os.mknod(self._root.near(name), stat.S_IFCHR, 0)
        except FileExistsError:
            if not has_only_whiteouts(self._root, name, self.implied, self.opaque_folders):
                # Entries of this layer with that name stay. Only those of the layers below are hidden.
                if self._root.kind(name) == stat.S_IFDIR:
                    self.opaque_folders[name] = None
                return
            self._clear(name)
            os.mknod(self._root.near(name), stat.S_IFCHR, 0)
        if folder:
            self.hiding[folder] = None
        self._count(0)

    def _make_opaque(self, entry: Entry, folder: bytes) -> None:
        """Make the folder opaque, and create it if it does not exist."""
        if not folder:
            self.opaque = True  # overlayfs ignores the mark on a layer's root, so the layers below are not mounted
            return
        kind = self._root.kind(folder)
        if kind != stat.S_IFDIR:
            if kind not in (0, WHITED_OUT):
                raise TarError(f"{shown(entry.name)} is below {shown(folder)}, which is not a folder")
            self._make_folder(folder, 0o755)
            self.implied[folder] = None
            self._count(DISK_BLOCK)
        self.opaque_folders[folder] = None

    def _make(self, path: bytes, make: Callable[[bytes], T]) -> T:
        """Call ``make``. If a folder is missing, make it; if a file exists, remove it; then call ``make`` again."""
        try:
            return make(self._root.near(path))
        except (FileNotFoundError, NotADirectoryError):
            if b"/" not in path:
                raise
            self._make_parents(path)
        except FileExistsError:
            self._clear(path)
        return make(self._root.near(path))

    def _make_parents(self, path: bytes) -> None:
        """Make the missing parent folders of ``path``, which have no entry yet, also behind links."""
        folder, there = self._root.resolve(path.rpartition(b"/")[0])
        parts = folder.split(b"/")
        # A whiteout in the path is replaced by an opaque folder.
        first = there - 1 if there and self._root.kind(b"/".join(parts[:there])) == WHITED_OUT else there
        for count in range(first + 1, len(parts) + 1):
            parent = b"/".join(parts[:count])
            if parent and self._make_folder(parent, 0o755):
                self.implied[parent] = None
                self._count(DISK_BLOCK)

    def _clear(self, path: bytes) -> None:
        """Remove the file or tree at ``path``."""
        pending = [path]
        while pending:
            current = pending[-1]
            name = self._root.near(current)
            status = os.lstat(name)
            if stat.S_ISDIR(status.st_mode):
                children = os.listdir(name)
                if children:
                    pending.extend([current + b"/" + child for child in children])
                    continue
                os.rmdir(name)
                self._times.pop(current, None)
                self._default_acls.pop(current, None)
                self.implied.pop(current, None)
                self.opaque_folders.pop(current, None)
                self._uncount(DISK_BLOCK)
            else:
                counted = stat.S_ISREG(status.st_mode) and self._places.at(current) is None
                os.unlink(self._root.near(current))
                if status.st_nlink == 1:
                    self._uncount(status.st_size if counted else 0)
            pending.pop()

    def _set_owner(self, entry: Entry, name: bytes) -> None:
        if entry.uid or entry.gid or self._groups_inherited:
            os.chown(name, entry.uid, entry.gid, follow_symlinks=False)

    def _count(self, size: int) -> None:
        self.used_inodes += 1
        self.used_bytes += _blocks(size)

    def _uncount(self, size: int) -> None:
        self.used_inodes -= 1
        self.used_bytes -= _blocks(size)


def named(error: Exception, name: bytes) -> Exception:
    """What to raise for an error at the entry ``name``: a fault of the layer, or the disk's own error as it is."""
    reason = str(error)
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENOMEM):
            return error
        if error.errno == errno.EFBIG:
            return LimitError(f"{shown(name)} is larger than images.max_layer_bytes")
        reason = error.strerror or reason
    return TarError(f"{shown(name)} could not be made: {reason}")


def _blocks(size: int) -> int:
    return -(-size // DISK_BLOCK) * DISK_BLOCK


def mtime_of(entry: Entry) -> int:
    """The modification time in nanoseconds; 0 (1970) if it does not fit, as in containerd."""
    return entry.mtime if -_LAST_NANOSECOND <= entry.mtime <= _LAST_NANOSECOND else 0
