"""`make test` runs every test."""

from __future__ import annotations

import subprocess
import tomllib
from collections import Counter
from pathlib import Path

_PROJECT = Path(__file__).parents[2]


def test_each_test_is_in_one_part() -> None:
    command = (str(_PROJECT / "scripts/test.sh"), "--parts")
    patterns = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    options = tomllib.loads((_PROJECT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    tests = Counter(file for folder in options["testpaths"] for file in (_PROJECT / folder).rglob("test_*.py"))
    parts = Counter(
        file
        for pattern in patterns
        for path in _PROJECT.glob(pattern)
        for file in ((path,) if path.is_file() else path.rglob("test_*.py"))
    )
    assert parts == tests
