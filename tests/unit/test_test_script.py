"""`make test` runs every test, and `make test-debian13` every unit and integration test."""

from __future__ import annotations

import subprocess
import tomllib
from collections import Counter
from pathlib import Path

import pytest

_PROJECT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "options, folders",
    [
        ([], tomllib.loads((_PROJECT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["testpaths"]),
        (["--unit-and-integration"], ["tests/unit", "tests/integration"]),
    ],
    ids=["all", "unit_and_integration"],
)
def test_each_test_is_in_one_part(options: list[str], folders: list[str]) -> None:
    command = (str(_PROJECT / "scripts/test.sh"), *options, "--parts")
    patterns = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    tests = Counter(file for folder in folders for file in (_PROJECT / folder).rglob("test_*.py"))
    parts = Counter(
        file
        for pattern in patterns
        for path in _PROJECT.glob(pattern)
        for file in ((path,) if path.is_file() else path.rglob("test_*.py"))
    )
    assert parts == tests
