"""Folders of pods and containers are removed although files are written into them meanwhile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from host.errors import PodkeelError
from runtime.namespaces.pinned import remove_path


def test_a_file_that_appears_while_its_folder_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "pod"
    folder.mkdir()
    appearing = [folder / "rows", folder / "rows.new"]
    rmdir = os.rmdir

    def rmdir_too_late(name: Any, *, dir_fd: int | None = None) -> None:
        if appearing:
            appearing.pop().touch()
        rmdir(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "rmdir", rmdir_too_late)
    remove_path(folder)
    assert not appearing
    assert not folder.exists()


def test_a_folder_that_cannot_be_removed_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "pod"
    folder.mkdir()

    def refuse(name: Any, *, dir_fd: int | None = None) -> None:
        raise OSError(39, os.strerror(39))

    monkeypatch.setattr(os, "rmdir", refuse)
    with pytest.raises(PodkeelError, match="pod: Directory not empty"):
        remove_path(folder)
