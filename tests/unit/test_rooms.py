"""The shape of the project: which room may import which, and how long a module may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

AnyFunction = ast.FunctionDef | ast.AsyncFunctionDef
ROOT = Path(__file__).parents[2]
MAX_MODULE_LENGTH = 400
MAX_MODULES = 15

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
AGENT_COMMANDS = {f"cli/agent/{name}.py" for name in ("serve", "serve_images", "config", "check", "reset")}
# The commands that open streams use the SPDY machine of the streaming server, which loads nothing of the agent.
STREAM_COMMANDS = {"cli/streams/client.py", "cli/streams/remote_command.py", "cli/streams/port_forward.py"}
STREAM_MODULES = {f"cri.streaming.httpstream.{name}" for name in ("channel", "connection", "descriptors", "spdy_link")}
SPDY_MODULES = {f"cri.streaming.httpstream.{name}" for name in ("spdy_events", "spdy_frames", "spdy_session", "turns")}
ROOMS_WITH_GRPC = {"cri", "cli"}
PROJECT_FOLDERS = {*ARROWS, "tests", "scripts"}


# Within a room: its subfolders and the modules directly in it, lowest first. A module may import its own folder and the
# lines above its line. The modules of SPLIT_FOLDERS are listed one by one.
LEVELS = {
    "host": (
        "errors libc quantities systemd untrusted_json",
        "concurrency kept_rows listener scheduling seccomp stages",
        "files",
        "cgroups children database",
        "database_copy processes",
        "subreaper",
    ),
    "proto": ("wire",),
    "metrics": (
        "instruments stats",
        "agent cgroups filesystems processes samples usage",
        "catalog exposition meters network",
    ),
    "network": (
        "attachment ipam netlink options rwlock schema status sysctl",
        "netlink_socket ports",
        "conntrack nftables rtnetlink store",
        "bandwidth",
        "bridge cni",
        "node_network",
    ),
    "images": (
        "oci options schema unpack/tar usage",
        "image serving signatures unpack/writing",
        "content",
        "unpack",
        "chunked",
        "layers",
        "disk_usage image_rows outgoing snapshots",
        "archives registry store",
        "checker exporter puller",
        "images",
    ),
    "runtime": (
        "folder_lock logs nri/answers options specgen/config specgen/facts specgen/signals specgen/sysctls",
        "layout nri/plugins specgen/capabilities specgen/cdi specgen/hooks_dir specgen/namespaces",
        "agent_id namespaces specgen/node_facts",
        "reserve specgen/limits specgen/security",
        "cgroups specgen/mounts state",
        "oci specgen/devices specgen/identity specgen/process statistics",
        "checkpoint specgen/draft",
        "checkpoint/restore hooks specgen/builder",
        "checkpoint/pod containers/bundle nri",
        "checkpoints containers/endings plugins",
        "containers",
        "pods",
        "recovery",
        "agent",
        "reset",
    ),
    "cri": (
        "activation config connections enums errors kernel_check service_reports streaming/httpstream version",
        "host_check methods streaming",
        "stream_backend telemetry",
        "image_server observation reload reset",
        "services",
        "server",
    ),
    "cli": (
        "arguments client log_file manifest text",
        "agent lookup main",
        "connect",
        "debug explain logs plugins pods stats streams",
        "images node",
        "checkpoints run",
    ),
}
SPLIT_FOLDERS = {"runtime/specgen"}


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


def test_pyroute2_is_used_at_one_place_and_no_client_loads_it() -> None:
    using = {str(path.relative_to(ROOT)) for room in ARROWS for path in modules(room) if "pyroute2" in imported(path)}
    assert using == {"network/netlink.py"}
    # It takes 35 ms and 4 MiB, and twice that with the parts that nothing uses.
    script = "import sys, network.netlink; print('pyroute2.netlink' in sys.modules, 'pyroute2.ndb' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.split() == ["True", "False"]
    clients = [path for path in modules("cli") if str(path.relative_to(ROOT)) not in AGENT_COMMANDS]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in clients if path.stem != "__init__"]
    script = f"import sys, {', '.join(names)}; print('pyroute2' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.split() == ["False"]


@pytest.mark.parametrize("path", sorted(STREAM_COMMANDS))
def test_stream_commands_take_no_more_of_the_server_than_its_spdy_machine(path: str) -> None:
    tree = ast.parse((ROOT / path).read_text())
    names = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in names if name.split(".")[0] == "cri"} <= STREAM_MODULES


def _sets_state(node: ast.AST) -> bool:
    """Whether this sets the ``state`` of an object other than ``self``."""
    if isinstance(node, ast.Attribute):
        return node.attr == "state" and isinstance(node.ctx, ast.Store | ast.Del) and ast.unparse(node.value) != "self"
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr" and "'state'" in ast.unparse(node)


@pytest.mark.parametrize("room", ["runtime", "cri"])
def test_only_the_state_sets_states(room: str) -> None:
    """``State.move`` looks into the table of transitions; code elsewhere that sets a record's state bypasses it."""
    setting = [
        f"{path.relative_to(ROOT)}: {ast.unparse(node)}"
        for path in modules(room)
        if path.parent != ROOT / "runtime" / "state"
        for node in ast.walk(ast.parse(path.read_text()))
        if _sets_state(node)
    ]
    assert setting == []


def test_only_the_state_writes_rows_of_pods_and_containers() -> None:
    """``State`` alone calls ``rows``; recovery compares the whole store with the node."""
    known = all_modules()
    users: dict[str, set[str]] = {"host.database": set(), "runtime.state.rows": set()}
    for name, path in known.items():
        for used in imported_modules(path, users) if name.startswith(("runtime.", "cri.")) else ():
            users[used].add(name)
    assert users["runtime.state.rows"] == {"runtime.agent", "runtime.state.state"}
    recovery = {"runtime.recovery.audit", "runtime.recovery.kept_rows"}
    assert users["host.database"] == {"runtime.agent", "runtime.state.rows", *recovery}


def _annotations(path: Path) -> Iterator[str]:
    """The names in the annotations of a module's fields, variables and parameters."""
    for node in ast.walk(ast.parse(path.read_text())):
        annotation = node.annotation if isinstance(node, ast.arg | ast.AnnAssign) else None
        if annotation is not None:
            yield from (name.id for name in ast.walk(annotation) if isinstance(name, ast.Name))


def test_no_class_of_the_runtime_gets_the_whole_agent() -> None:
    """Each class takes the few things that it uses; ``Agent`` alone has all and puts them together."""
    paths = modules("runtime")
    nodes = [path for path in paths for node in ast.walk(ast.parse(path.read_text())) if _is_class(node, "Node")]
    assert nodes == []
    assert [str(path.relative_to(ROOT)) for path in paths if "Agent" in set(_annotations(path))] == []


def _is_class(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.ClassDef) and node.name == name


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
    assert {name: length for name, length in lengths.items() if length > MAX_MODULE_LENGTH} == {}


def all_modules() -> dict[str, Path]:
    """Every module of the product by its dotted name, without generated ones and packages."""
    found = [path for room in ARROWS for path in modules(room) if path.name != "__init__.py"]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in found}


def imported_modules(path: Path, known: Collection[str]) -> set[str]:
    """The modules of the product that a module imports, also inside functions and type-checking blocks."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found & set(known)


def place(name: str) -> str:
    """What of a room a module counts as: its folder, or itself in the room's own folder and in SPLIT_FOLDERS."""
    folder = name.replace(".", "/").rpartition("/")[0]
    return name.replace(".", "/") if "/" not in folder or folder in SPLIT_FOLDERS else folder


@pytest.mark.parametrize("room", LEVELS)
def test_modules_import_only_lower_levels_of_their_room(room: str) -> None:
    level = {f"{room}/{name}": number for number, names in enumerate(LEVELS[room]) for name in names.split()}
    known = all_modules()
    own = [name for name in known if name.startswith(f"{room}.")]
    assert {place(name) for name in own} == set(level), "LEVELS names each folder and root module of a room"
    wrong = [
        f"{name} imports {other}"
        for name in own
        for other in imported_modules(known[name], own)
        if place(name) != place(other) and level[place(other)] >= level[place(name)]
    ]
    assert wrong == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    known = all_modules()
    sorter = TopologicalSorter({name: imported_modules(path, known) for name, path in known.items()})
    sorter.prepare()  # CycleError names the modules


def test_folders_are_small_enough_to_look_through() -> None:
    counts = Counter(path.parent.relative_to(ROOT) for path in all_modules().values())
    assert {str(folder): count for folder, count in counts.items() if count > MAX_MODULES} == {}


def test_packages_hold_a_docstring_and_nothing_else() -> None:
    packages = [path for room in ARROWS for path in (ROOT / room).rglob("__init__.py")]
    bodies = {str(path.relative_to(ROOT)): ast.parse(path.read_text()).body for path in packages}
    generated = {name for name in bodies if name.startswith("proto/")}
    wrong = [name for name, body in bodies.items() if len(body) != 1 or not isinstance(body[0], ast.Expr)]
    assert set(wrong) - generated == set()


def test_commands_name_functions_that_exist() -> None:
    known = all_modules()
    texts = [path.read_text() for path in (ROOT / "cli/arguments").glob("*.py")]
    named = {node.value for text in texts for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)}
    handlers = {name for name in named if isinstance(name, str) and re.fullmatch(r"[a-z_]+(\.[a-z_]+)*:[a-z_]+", name)}
    assert len(handlers) > 30
    for handler in handlers:
        module, _, function = handler.partition(":")
        functions = {
            node.name
            for node in ast.walk(ast.parse(known[f"cli.{module}"].read_text()))
            if isinstance(node, AnyFunction)
        }
        assert function in functions, handler


def test_modules_that_are_loaded_by_name_exist() -> None:
    known = all_modules()
    found = []
    for path in known.values():
        folder = ".".join(path.relative_to(ROOT).parent.parts)
        names = re.findall(r'(?:from |import_module(?:\(|, )f")\{__package__\}\.([\w.]+)', path.read_text())
        found += [(path, f"{folder}.{name}") for name in names]
    assert len(found) > 4
    assert [(path, name) for path, name in found if name not in known] == []
