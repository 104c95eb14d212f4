"""The shape of the project: which room may import which, and how long a module may be."""

from __future__ import annotations

import ast
import subprocess
import sys
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
AGENT_COMMANDS = {"cli/agent/serve.py", "cli/agent/config.py", "cli/agent/check.py", "cli/agent/reset.py"}
# The commands that open streams speak SPDY with the machine of the streaming server, which loads nothing of the agent.
STREAM_COMMANDS = {"cli/streams/client.py", "cli/streams/remote_command.py", "cli/streams/port_forward.py"}
STREAM_MODULES = {f"cri.streaming.httpstream.{name}" for name in ("channel", "connection", "descriptors", "spdy_link")}
SPDY_MODULES = {f"cri.streaming.httpstream.spdy_{name}" for name in ("events", "frames", "session")}
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
    assert loading == AGENT_COMMANDS | STREAM_COMMANDS
    script = f"import sys, {', '.join(sorted(STREAM_MODULES))}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    ours = {name for name in loaded.stdout.split() if name.split(".")[0] in PROJECT_FOLDERS}
    assert ours == STREAM_MODULES | {"cri", "cri.streaming", "cri.streaming.httpstream", *SPDY_MODULES}


@pytest.mark.parametrize("path", sorted(STREAM_COMMANDS))
def test_stream_commands_take_no_more_of_the_server_than_its_spdy_machine(path: str) -> None:
    tree = ast.parse((ROOT / path).read_text())
    names = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in names if name.split(".")[0] == "cri"} <= STREAM_MODULES


@pytest.mark.parametrize("room", ["runtime", "cri"])
def test_only_the_state_sets_states(room: str) -> None:
    """``State.move`` looks into the table of transitions; who sets a record's state elsewhere goes past it."""
    setting = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in modules(room)
        if path.parent != ROOT / "runtime" / "state"
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Attribute) and node.attr == "state" and isinstance(node.ctx, ast.Store | ast.Del))
        or (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr" and "'state'" in ast.unparse(node))
    ]
    assert setting == []


# Containers' root file systems are mounted for calls about containers; all other work of these rooms has its own pools.
CONTAINERS_POOL_OF_IMAGES = {"images/snapshots/store.py"}


@pytest.mark.parametrize("room", ["images", "metrics", "network"])
def test_work_of_a_room_takes_no_threads_from_calls_about_containers(room: str) -> None:
    using = {
        str(path.relative_to(ROOT))
        for path in modules(room)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Name | ast.Attribute | ast.alias)
        and {getattr(node, part, "") for part in ("id", "attr", "name")} & {"in_thread", "to_thread"}
    }
    assert using - CONTAINERS_POOL_OF_IMAGES == set(), (
        "use the pool of host/concurrency/threads.py that is for this purpose"
    )


def test_modules_are_short_enough_to_read() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for folder in PROJECT_FOLDERS
        for path in modules(folder)
    }
    assert {name: length for name, length in lengths.items() if length > LONGEST_MODULE} == {}
