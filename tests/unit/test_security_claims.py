"""docs/security.md and tests/security say the same list: each file of tests is named there with what it checks."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| \[(test_\w+\.py)\]\(\.\./tests/security/\1\) \| (.+) \|$", re.MULTILINE)


def first_sentence(file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
    return " ".join(docstring.split("\n\n")[0].split())


def test_each_file_of_security_tests_is_in_the_document() -> None:
    """When this fails: make the row in docs/security.md, "What checks it", the first paragraph of the file."""
    claimed = ROW.findall((ROOT / "docs/security.md").read_text())
    checked = [(file.name, first_sentence(file)) for file in sorted((ROOT / "tests/security").glob("test_*.py"))]
    assert claimed == checked


def test_tests_that_the_document_names_are_there() -> None:
    named = re.findall(r"`(tests/[\w/.*]+)`", (ROOT / "docs/security.md").read_text())
    named += [
        f"tests/security/{name}" for name in re.findall(r"`(test_\w+\.py)`", (ROOT / "docs/security.md").read_text())
    ]
    assert named
    assert [path for path in named if not list(ROOT.glob(path))] == []
