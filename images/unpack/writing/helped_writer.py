"""Writing a layer with a second process (``images/unpack/writing/helper_process.py``) that makes its small new files.

The result is that of one entry after the other. An entry is written while files are still being made only if it has
nothing to do with them: it is new, has another name, and is in a folder that this layer has under that very path, with
no link in it. Everything else waits until all files are made.
"""

# Names are bytes, which pathlib does not take.
# ruff: noqa: PTH102, PTH211
from __future__ import annotations

import os
import stat

from images.unpack.tar.headers import FOLDER, HARD_LINK, REGULAR, SYMBOLIC_LINK, Entry, LimitError, TarError
from images.unpack.writing.helper_process import MAX_BYTES, MAX_FILE_BYTES, MAX_FILES, HelperProcess
from images.unpack.writing.layer_root import is_clean
from images.unpack.writing.layer_writer import DISK_BLOCK, LayerWriter, named
from images.unpack.writing.small_file import NEW_FILE, failed_files, make_file

TYPE_CHECKING = False  # as type checkers know it, without importing typing
if TYPE_CHECKING:
    from collections.abc import Callable

    from images.unpack.tar.reader import TarReader
    from images.unpack.writing.small_file import SmallFile


class HelpedLayerWriter(LayerWriter):
    """A ``LayerWriter`` that gives small files to ``helper``."""

    def __init__(self, reader: TarReader, max_entries: int, helper: HelperProcess) -> None:
        super().__init__(reader, max_entries)
        self._helper = helper
        self._batch: list[SmallFile] = []  # to be sent
        self._batch_bytes = 0
        self._pending: set[bytes] = set()  # files that may not be made yet
        self._failed: list[SmallFile] = []
        # Folders that exist under this path, with no link in it, and all that they are in.
        self._known: set[bytes] = {b""}
        self._of_kind: dict[bytes, Callable[[Entry, bytes], bool]] = {
            REGULAR: self._new_file,
            FOLDER: self._new_folder,
            SYMBOLIC_LINK: self._new_symbolic_link,
            HARD_LINK: self._new_hard_link,
        }

    def write_all(self) -> None:
        """Write every entry of the reader, then the times of the folders."""
        try:
            super().write_all()
        except (TarError, LimitError):
            self._settle()  # an earlier entry may have caused it
            raise

    def _apply(self, entry: Entry) -> None:
        path = entry.name.removeprefix(b"./")
        if entry.kind == FOLDER:
            path = path.removesuffix(b"/")
        if entry.kind in self._of_kind and self._is_new(path) and self._of_kind[entry.kind](entry, path):
            return
        self._settle()
        super()._apply(entry)
        if entry.kind in (REGULAR, FOLDER):
            self._get_to_know(path if entry.kind == FOLDER else path[: max(path.rfind(b"/"), 0)])

    def _is_new(self, path: bytes) -> bool:
        """Whether ``path`` is in a known folder, and is neither a known folder nor a file that may not be made yet."""
        return (
            path[: max(path.rfind(b"/"), 0)] in self._known
            and path not in self._known
            and path not in self._pending
            and is_clean(path)
            and b".wh." not in path
            and not self._root.away
        )

    def _new_file(self, entry: Entry, path: bytes) -> bool:
        """Have a new file made, by the helper if it is small; False, and nothing is done, if it is not new."""
        file = self._small_file(entry, path) if entry.size <= MAX_FILE_BYTES else None
        if file is None:
            try:
                descriptor = os.open(path, NEW_FILE, entry.mode)
            except OSError:
                return False
            self._fill(entry, descriptor)
            return True
        self._batch.append(file)
        self._batch_bytes += len(path) + entry.size
        self._pending.add(path)
        self._count(entry.size)
        if len(self._batch) == MAX_FILES or self._batch_bytes >= MAX_BYTES:
            self._send_batch()
        return True

    def _new_folder(self, entry: Entry, path: bytes) -> bool:
        # Files take over attributes and groups of some folders, so it matters when these are set.
        if entry.mode & stat.S_ISGID or entry.xattrs:
            return False
        try:
            os.mkdir(path, entry.mode)
        except OSError:
            return False
        self._known.add(path)
        self._describe_folder(entry, path)
        self._count(DISK_BLOCK)
        return True

    def _new_symbolic_link(self, entry: Entry, path: bytes) -> bool:
        try:
            os.symlink(entry.link, path)
        except OSError:
            return False
        self._describe(entry, path)
        return True

    def _new_hard_link(self, entry: Entry, path: bytes) -> bool:
        target = entry.link.removeprefix(b"./")
        if self._has_whiteouts or not self._is_new(target):  # so it is not a file that may not be made yet
            return False
        try:
            os.link(target, path, follow_symlinks=False)
        except OSError:
            return False
        self._places.linked(path)
        return True

    def _send_batch(self) -> None:
        """Send the batch to the helper, or make its files here if that has enough to do."""
        while (answer := self._helper.answer(wait=False)) is not None:
            self._take(*answer)
        if self._helper.send(self._batch):
            self._batch, self._batch_bytes = [], 0
        else:
            self._make_batch()
        if self._failed:
            self._settle()

    def _make_batch(self) -> None:
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        self._take(batch, failed_files(batch))

    def _take(self, batch: list[SmallFile], failed: list[int]) -> None:
        """The files of ``batch`` are made, except for those at the places of ``failed``."""
        self._failed += [batch[place] for place in failed]
        self._pending.difference_update([file[0] for file in batch])

    def _settle(self) -> None:
        """Wait until all files are made. Those with something in the way are made here. Errors as ``write_all``."""
        self._make_batch()
        while (answer := self._helper.answer(wait=True)) is not None:
            self._take(*answer)
        failed, self._failed = self._failed, []
        for file in failed:
            self._make_here(file)

    def _make_here(self, file: SmallFile) -> None:
        try:
            self._make(file[0], lambda _: make_file(file))
        except (OSError, ValueError, OverflowError) as error:
            raise named(error, file[0]) from None

    def _get_to_know(self, folder: bytes) -> None:
        """Take note of ``folder`` and those that it is in, if they are folders and no links."""
        if folder in self._known or not is_clean(folder):
            return
        end = 0
        while end >= 0:
            end = folder.find(b"/", end + 1)
            path = folder[:end] if end >= 0 else folder
            if path not in self._known:
                if self._root.kind(path) != stat.S_IFDIR:
                    return
                self._known.add(path)

    def _clear(self, path: bytes) -> None:
        self._known = {b""}  # what is removed may be one of them
        super()._clear(path)
