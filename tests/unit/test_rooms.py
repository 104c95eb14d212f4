"""The shape of the project: which room may import which, and how long a module may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONGEST_MODULE = 400

# Each room with the rooms it may import. The arrows point down; docs/architecture.md has the picture.
ARROWS = {
    "host": set(),
    "proto": set(),
    "metrics": {"host"},
    "network": {"host"},
    "images": {"host"},
    "runtime": {"host", "metrics", "network", "images", "proto"},
    "cri": {"host", "metrics", "network", "images", "runtime", "proto"},
    "cli": {"host", "proto", "cri"},
}
# The commands that are the agent, or are about its host: the others are clients and never load the server.
AGENT_COMMANDS = {"cli/serve.py", "cli/config.py", "cli/check.py", "cli/reset.py"}
ROOMS_WITH_GRPC = {"cri", "cli"}
PROJECT_FOLDERS = {*ARROWS, "tests", "scripts"}


def modules(room: str) -> list[Path]:
    return [path for path in sorted((ROOT / room).rglob("*.py")) if not path.name.endswith("_pb2.py")]


def imported(path: Path) -> Iterator[str]:
    """The first part of every name a module imports, also inside functions and type-checking blocks."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0] if node.level == 0 else path.relative_to(ROOT).parts[0]


def test_every_room_is_there() -> None:
    assert all(modules(room) for room in ARROWS)


@pytest.mark.parametrize("room", ARROWS)
def test_arrows_point_down(room: str) -> None:
    allowed = ARROWS[room] | {room}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(room)
        for name in imported(path)
        if name in PROJECT_FOLDERS - allowed
    ]
    assert wrong == []


@pytest.mark.parametrize("room", sorted(set(ARROWS) - ROOMS_WITH_GRPC))
def test_only_the_surface_knows_grpc(room: str) -> None:
    assert [str(path.relative_to(ROOT)) for path in modules(room) if "grpc" in set(imported(path))] == []


def test_client_commands_do_not_load_the_server() -> None:
    loading = {str(path.relative_to(ROOT)) for path in modules("cli") if "cri" in set(imported(path))}
    assert loading == AGENT_COMMANDS


def test_modules_are_short_enough_to_read() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for folder in PROJECT_FOLDERS
        for path in modules(folder)
    }
    assert {name: length for name, length in lengths.items() if length > LONGEST_MODULE} == {}
