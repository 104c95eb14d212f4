"""Sets the SELinux label of a container on the files that it uses."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

from host.errors import InvalidArgumentError
from host.files.file_tree import Walk
from runtime.specgen.security.selinux import Relabel

ATTRIBUTE = "security.selinux"


def relabel_all(
    relabels: Iterable[Relabel], attribute: str = ATTRIBUTE, check: Callable[[], None] = lambda: None
) -> int:
    """Set the labels of files, without following links. Blocks for large trees. Returns how many changed.

    The paths must be resolved: one with a symbolic link is refused. Files that have the label are not changed, and
    files that are deleted meanwhile are skipped. A file system without labels (such as NFS) has one for all its files,
    set when it is mounted. ``check`` is called before each file and may raise. Raises InvalidArgumentError for files
    that cannot be labelled for another reason.
    """
    changed = 0
    for wanted in relabels:
        try:
            changed += _relabel(wanted.path, wanted.label.encode(), attribute, check)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise InvalidArgumentError(
                    f"{wanted.path} cannot be given the SELinux label {wanted.label}: {error.strerror}"
                ) from error
    return changed


def _relabel(root: str, label: bytes, attribute: str, check: Callable[[], None]) -> int:
    # Containers may change the tree meanwhile: each file is reached only by its name in an open folder.
    descriptor = os.open(root, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        own = f"/proc/self/fd/{descriptor}"
        if str(Path(own).readlink()) != root:  # a link was put into the path after it was resolved and checked
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        changed = int(_set_label(own, label, attribute, follow_symlinks=True))
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            return changed
        folder = os.open(f"{own}/.", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    finally:
        os.close(descriptor)
    try:
        walk = Walk(folder, on_error=_pass_over_vanished, into_mounts=True)
        for step in walk:
            check()
            if step.entry is not None:
                with contextlib.suppress(FileNotFoundError):
                    changed += _set_label(
                        f"/proc/self/fd/{step.folder}/{step.name}", label, attribute, follow_symlinks=False
                    )
    finally:
        os.close(folder)
    if walk.left_out:
        raise InvalidArgumentError(
            f"{root} could not be relabelled completely: it has too many folders, or they were moved"
        )
    return changed


def _set_label(path: str, label: bytes, attribute: str, *, follow_symlinks: bool) -> bool:
    try:
        if os.getxattr(path, attribute, follow_symlinks=follow_symlinks).rstrip(b"\0") == label:
            return False
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
    os.setxattr(path, attribute, label, follow_symlinks=follow_symlinks)
    return True


def _pass_over_vanished(_: str, error: OSError) -> None:
    if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
        raise error
