"""Versions by the tags of git."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/version.py"
specification = importlib.util.spec_from_file_location("version_script", SCRIPT)
assert specification is not None and specification.loader is not None
script = importlib.util.module_from_spec(specification)
specification.loader.exec_module(script)
find_version: Callable[[Path], str] = script.find_version


def git(folder: Path, *words: str) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    subprocess.run(["git", "-C", folder, *identity, *words], check=True, capture_output=True, env=environment)


def test_version_of_a_repository(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "one")
    git(tmp_path, "tag", "other")
    assert re.fullmatch(r"0\.0\.0\+1\.g[0-9a-f]{7,}", find_version(tmp_path))
    assert "has no tag of a version" in capsys.readouterr().err
    git(tmp_path, "tag", "v1.2.0rc1")
    assert find_version(tmp_path) == "1.2.0rc1"
    (tmp_path / "file").write_text("x")
    git(tmp_path, "add", "file")
    assert re.fullmatch(r"1\.2\.0rc1\+0\.g[0-9a-f]{7,}\.dirty", find_version(tmp_path))
    git(tmp_path, "commit", "-m", "two")
    assert re.fullmatch(r"1\.2\.0rc1\+1\.g[0-9a-f]{7,}", find_version(tmp_path))
    git(tmp_path, "tag", "-a", "v1.2.0", "-m", "annotated")
    if os.geteuid() == 0:  # root builds the checkouts of other users too
        os.chown(tmp_path, 12345, 12345)
    assert find_version(tmp_path) == "1.2.0"
    assert capsys.readouterr().err == ""


def test_version_of_an_unpacked_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "ARCHIVED", "v1.2.3-4-gabcdef0")
    assert find_version(tmp_path) == "1.2.3+4.gabcdef0"
    monkeypatch.setattr(script, "ARCHIVED", "v1.2.3")
    assert find_version(tmp_path) == "1.2.3"
    (tmp_path / "PKG-INFO").write_text("Metadata-Version: 2.4\nName: podkeel\nVersion: 4.5.6\n")
    assert find_version(tmp_path) == "4.5.6"


def test_version_without_git_is_unknown_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_version(tmp_path) == "0.0.0+unknown"
    assert "no git repository" in capsys.readouterr().err
    (tmp_path / ".git").mkdir()
    assert find_version(tmp_path) == "0.0.0+unknown"
    assert "git cannot describe" in capsys.readouterr().err
