"""`make test` runs every folder of tests."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

_PROJECT = Path(__file__).parents[2]


def test_the_two_halves_are_all_tests() -> None:
    script = (_PROJECT / "scripts/test.sh").read_text()
    here, apart = (re.search(rf"^readonly {half}=\((.*)\)$", script, re.M)[1].split() for half in ("HERE", "APART"))  # type: ignore[index]
    options = tomllib.loads((_PROJECT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    moved = [word.removeprefix("--ignore=") for word in here if word.startswith("--ignore=")]
    assert set(moved) <= set(apart)
    assert sorted({*here, *apart} - {f"--ignore={name}" for name in moved} - set(moved)) == sorted(options["testpaths"])
