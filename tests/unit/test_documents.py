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
ANCHOR = re.compile(r"\]\(((?!https?:)[^)#]*)#([^)]+)\)")
BARE_MODULE = re.compile(r"`(\w+\.py)`")
FOLDER = re.compile(rf"`((?:{'|'.join(ROOMS)})/(?:[\w-]+/)*)`")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_a_document_names_exist(document: str) -> None:
    named = MODULE.findall((ROOT / document).read_text())
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_a_document_links_to_exist(document: str) -> None:
    linked = LINK.findall((ROOT / document).read_text())
    assert [path for path in linked if not ((ROOT / document).parent / path).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_modules_that_a_document_names_without_their_folder_exist(document: str) -> None:
    named = BARE_MODULE.findall((ROOT / document).read_text())
    known = {path.name for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert [name for name in named if name not in known] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_folders_that_a_document_names_exist(document: str) -> None:
    named = FOLDER.findall((ROOT / document).read_text())
    assert [path for path in named if not (ROOT / path).is_dir()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_headings_that_a_document_links_to_exist(document: str) -> None:
    path = ROOT / document
    linked = ANCHOR.findall(path.read_text())
    assert [link for link in linked if link[1] not in anchors(path.parent / link[0] if link[0] else path)] == []


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_links_to_every_document() -> None:
    linked = LINK.findall((ROOT / "README.md").read_text())
    assert [path.name for path in ROOT.glob("docs/*.md") if f"docs/{path.name}" not in linked] == []


def test_the_architecture_links_to_every_decision_record() -> None:
    linked = LINK.findall((ROOT / "docs/architecture.md").read_text())
    records = ROOT.glob("docs/decisions/*.md")
    assert [path.name for path in records if f"decisions/{path.name}" not in linked] == []


def test_the_architecture_names_every_call_of_the_runtime_that_changes_something() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    calls = re.findall(r"^ +rpc (\w+)\(", (ROOT / "proto/runtime/v1/cri.proto").read_text(), re.MULTILINE)
    reading = re.compile(r"^(?:List|Stream)|Status$|Stats$|Config$|FsInfo$|^Version$")
    assert calls
    assert [call for call in calls if not reading.search(call) and call not in text] == []


def test_the_reading_path_takes_an_afternoon() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    files = re.findall(r"^\d+\. `([\w/]+\.py)`:", text, re.MULTILINE)
    assert len(files) == 10
    assert sum(len((ROOT / file).read_text().splitlines()) for file in files) < 3_000
