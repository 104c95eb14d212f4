"""The documents say what is true: the files that they name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]
ROOMS = ("host", "proto", "metrics", "network", "images", "runtime", "cri", "cli", "tests", "scripts", "manifests")
MODULE = re.compile(rf"`((?:{'|'.join(ROOMS)})/[\w/.-]+\.\w+)`")
LINK = re.compile(r"\]\(((?!https?:|#)[^)#]+)")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_a_document_names_exist(document: str) -> None:
    named = MODULE.findall((ROOT / document).read_text())
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_a_document_links_to_exist(document: str) -> None:
    linked = LINK.findall((ROOT / document).read_text())
    assert [path for path in linked if not ((ROOT / document).parent / path).exists()] == []


def test_the_reading_path_takes_an_afternoon() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    files = re.findall(r"^\d+\. `([\w/]+\.py)`:", text, re.MULTILINE)
    assert len(files) == 10
    assert sum(len((ROOT / file).read_text().splitlines()) for file in files) < 3_000
