"""Tests use public names of the product: ruff's SLF001 finds attributes, this finds imports and names in strings."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


def private(name: str) -> bool:
    """Whether a part of a dotted name is private, such as ``images.content.slots._WINDOW``."""
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


def uses(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module != "__future__":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr":
            names = [a.value for a in node.args[:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        else:
            continue
        yield from ((node.lineno, name) for name in names if private(name))


def test_no_test_imports_or_replaces_a_private_name() -> None:
    """When this fails: give the product a small public hook, or test what can be seen from outside."""
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for line, name in uses(ast.parse(path.read_text()))
    ]
    assert found == []
