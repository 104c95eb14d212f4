"""`make test` runs every folder of tests."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

_PROJECT = Path(__file__).parents[2]


def test_the_two_halves_are_all_tests() -> None:
    script = (_PROJECT / "scripts/test.sh").read_text()
    halves = [name for half in re.findall(r"^readonly (?:APART|HERE)=\((.*)\)$", script, re.M) for name in half.split()]
    options = tomllib.loads((_PROJECT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert sorted(halves) == sorted(options["testpaths"])
