"""Walks file trees of containers and images, with any depth and any names, by descriptors of open folders.

Paths are never joined, so PATH_MAX does not apply. A walk holds a limited number of descriptors and names. It follows
no link, and enters a mount only with ``into_mounts``.
"""

from __future__ import annotations

import os

from host import libc

TYPE_CHECKING = False  # the removal worker must start quickly, and importing typing is slow
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Self

MAX_OPEN = 32  # folders of one path that are open at the same time, without the root
MAX_WAITING = 200_000  # names of folders that a walk keeps until it enters them

_BELOW = libc.RESOLVE_NO_XDEV | libc.RESOLVE_NO_MAGICLINKS | libc.RESOLVE_NO_SYMLINKS | libc.RESOLVE_BENEATH
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_SHOWN_LENGTH = 200


def open_below(folder: int, name: str | bytes, flags: int, resolve: int = _BELOW) -> int:
    """Open ``name`` in the open ``folder``.

    Raises OSError for a link, a mount point, or a path that leaves the folder.
    """
    return libc.openat2(folder, os.fsencode(name), flags | os.O_NOFOLLOW, resolve)


class _Level:
    """One folder of a path.

    Its descriptor (-1 while closed), and its identity, which is checked when it is reopened.
    """

    __slots__ = ("descriptor", "identity")

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        status = os.fstat(descriptor)
        self.identity = (status.st_dev, status.st_ino)


class FolderStack:
    """The folders from a root down to the current one. Only the lowest ones and the root stay open.

    To leave a folder, its parent is opened again with ``..`` if it was closed.
    """

    def __init__(self, root: int, *, into_mounts: bool = False) -> None:
        self._levels = [_Level(os.dup(root))]
        self._resolve = _BELOW & ~libc.RESOLVE_NO_XDEV if into_mounts else _BELOW

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for level in self._levels:
            if level.descriptor >= 0:
                os.close(level.descriptor)
        self._levels.clear()

    @property
    def descriptor(self) -> int:
        """The descriptor of the current folder."""
        return self._levels[-1].descriptor

    @property
    def depth(self) -> int:
        """The number of folders between the root and the current one."""
        return len(self._levels) - 1

    def enter(self, name: str | bytes) -> None:
        """Enter the folder ``name``. Raises OSError if it is no folder, may not be entered, or cannot be opened."""
        self._levels.append(_Level(open_below(self.descriptor, name, _FOLDER, self._resolve)))
        too_high = len(self._levels) - 1 - MAX_OPEN
        if too_high > 0 and self._levels[too_high].descriptor >= 0:
            os.close(self._levels[too_high].descriptor)
            self._levels[too_high].descriptor = -1

    def leave(self) -> bool:
        """Go to the parent folder.

        Returns False if the folder was moved meanwhile and its parent cannot be found from it. Then the nearest
        ancestor that is still open becomes the current folder, in the end the root. ``depth`` says which one.
        """
        left = self._levels.pop()
        above = self._levels[-1]
        try:
            if above.descriptor >= 0:
                return True
            found = _Level(os.open("..", _FOLDER, dir_fd=left.descriptor))
            if found.identity == above.identity:
                above.descriptor = found.descriptor
                return True
            os.close(found.descriptor)
        except OSError:
            pass
        finally:
            os.close(left.descriptor)
        while self._levels[-1].descriptor < 0:
            self._levels.pop()
        return False


class Step:
    """One step of a walk: ``name`` in the open ``folder``.

    ``entry`` is the directory entry. It is None when the walk leaves a folder, after the folder's content.
    """

    __slots__ = ("entry", "folder", "name")

    def __init__(self, folder: int, name: str, entry: os.DirEntry[str] | None) -> None:
        self.folder = folder
        self.name = name
        self.entry = entry


class Walk:
    """Iterates over everything below the open folder ``root``: files, and folders before and after their content.

    A step is valid until the next one. ``on_error`` is called with the place of an object that cannot be opened or
    listed, and the walk continues. ``left_out`` says afterwards whether the walk left out more than that: more than
    ``max_waiting`` folders waited, or a folder was moved meanwhile. ``into_mounts``: mounts below the root are
    entered.
    """

    def __init__(
        self,
        root: int,
        *,
        on_error: Callable[[str, OSError], None] | None = None,
        max_waiting: int = MAX_WAITING,
        into_mounts: bool = False,
    ) -> None:
        self._root = root
        self._into_mounts = into_mounts
        self._on_error = on_error
        self._room = max_waiting
        self._names: list[str] = []
        self.left_out = False

    def place(self, name: str = "") -> str:
        """The current place of the walk, or of ``name`` in the current folder, relative to the root, for messages."""
        return shown("/".join([*self._names, name] if name else self._names) or ".")

    def names(self) -> list[str]:
        """The names of the folders from the root to the current one."""
        return list(self._names)

    def __iter__(self) -> Iterator[Step]:
        folders: list[list[str]] = [[]]  # for each folder from the root down: its folders that are not entered yet
        with FolderStack(self._root, into_mounts=self._into_mounts) as stack:
            yield from self._list(stack.descriptor, folders[0])
            while True:
                if folders[-1]:
                    if self._enter(stack, folders):
                        yield from self._list(stack.descriptor, folders[-1])
                elif stack.depth == 0:
                    return
                else:
                    name = self._names[-1]
                    if self._leave(stack, folders):
                        yield Step(stack.descriptor, name, None)

    def _list(self, folder: int, below: list[str]) -> Iterator[Step]:
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    yield Step(folder, entry.name, entry)
                    if entry.is_dir(follow_symlinks=False):
                        if self._room > 0:
                            self._room -= 1
                            below.append(entry.name)
                        else:
                            self.left_out = True
        except OSError as error:
            self._failed(self.place(), error)

    def _enter(self, stack: FolderStack, folders: list[list[str]]) -> bool:
        name = folders[-1].pop()
        self._room += 1
        try:
            stack.enter(name)
        except OSError as error:
            self._failed(self.place(name), error)
            return False
        self._names.append(name)
        folders.append([])
        return True

    def _leave(self, stack: FolderStack, folders: list[list[str]]) -> bool:
        followed = stack.leave()
        for lost in folders[stack.depth + 1 :]:
            self._room += len(lost)
            self.left_out |= bool(lost)
        del folders[stack.depth + 1 :], self._names[stack.depth :]
        self.left_out |= not followed
        return followed

    def _failed(self, place: str, error: OSError) -> None:
        if self._on_error is not None:
            self._on_error(place, error)


def shown(path: str) -> str:
    """A path for messages: names that are not UTF-8 are escaped, a long path is shortened in the middle."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
    half = _MAX_SHOWN_LENGTH // 2
    return text if len(text) <= _MAX_SHOWN_LENGTH else f"{text[:half]}…{text[-half:]}"
