"""The path of a container's log."""

from __future__ import annotations

import os
from pathlib import Path

from host.errors import InvalidArgumentError


def resolve_log_path(log_directory: str, log_path: str) -> Path | None:
    """The pod's ``log_directory`` joined with the container's ``log_path``; None if either is empty (no log).

    Raises InvalidArgumentError if the result is not inside the directory, because of ``..`` or a symbolic link.
    """
    if not log_directory or not log_path:
        return None
    if "\0" in log_directory + log_path:
        raise InvalidArgumentError("log_path has a NUL byte: remove it")
    if not log_directory.startswith("/"):
        raise InvalidArgumentError(f"log_directory {log_directory!r} is relative: use an absolute path")
    folder = os.path.normpath(log_directory)
    target = os.path.normpath(f"{folder}/{log_path}")
    if not _inside(target, folder):
        raise InvalidArgumentError(f"log_path {log_path!r} leads out of {log_directory}: use a path inside it")
    if not _inside(os.path.realpath(target), os.path.realpath(folder)):
        raise InvalidArgumentError(
            f"log_path {log_path!r} leads out of {log_directory} by a symbolic link: remove the link"
        )
    return Path(target)


def _inside(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")
