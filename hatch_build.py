"""Build hook: generates the protocol stubs, and maps the rooms below the package ``podkeel`` in a wheel.

The repository has its rooms at the top (``runtime/pods/run.py`` is the module ``runtime.pods.run``). An editable
installation uses them as they are. In a wheel the same module is ``podkeel.runtime.pods.run``, so that no name of a
room is at the top level of site-packages: docs/decisions/one-package.md.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "podkeel"
ROOMS = ("proto", "host", "metrics", "network", "images", "runtime", "cri", "cli")
_FROM = re.compile(r"from +(?=\w)")
_NOT_INSTALLED = (".pyc", ".proto")
_MAIN = f"""\"\"\"``python -m {PACKAGE}``.\"\"\"

import sys

from {PACKAGE}.cli.main import main

sys.exit(main())
"""


class PodkeelBuildHook(BuildHookInterface):
    """Makes the stubs in place, and the files of a wheel in a temporary folder."""

    _folder: tempfile.TemporaryDirectory[str] | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        make_stubs(root)
        if self.target_name == "wheel" and version == "standard":
            self._folder = tempfile.TemporaryDirectory(prefix="podkeel-wheel-")
            make_package(root, Path(self._folder.name))
            build_data["force_include"][self._folder.name] = PACKAGE
            commands = self.metadata.core.scripts
            commands.update({name: f"{PACKAGE}.{place}" for name, place in commands.items()})

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if self._folder is not None:
            self._folder.cleanup()


def make_stubs(root: Path) -> None:
    sources = sorted(str(path.relative_to(root)) for path in root.glob("proto/**/*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", "--python_out=.", "--pyi_out=.", *sources]
    subprocess.run(command, cwd=root, check=True)
    # An enum of NRI has a value None, which no Python file can declare.
    for stub in root.glob("proto/nri/**/*_pb2.pyi"):
        lines = stub.read_text().splitlines(keepends=True)
        stub.write_text("".join(line for line in lines if not line.lstrip().startswith("None: ")))


def make_package(root: Path, package: Path) -> None:
    """Write the rooms of ``root`` to ``package``, with imports of each other as modules of the package."""
    (package / "__init__.py").write_text(f'"""Podkeel, a Kubernetes node agent. Its command is ``{PACKAGE}``."""\n')
    (package / "__main__.py").write_text(_MAIN)
    (package / "py.typed").touch()
    for room in ROOMS:
        for source in sorted((root / room).rglob("*")):
            if not source.is_file() or source.suffix in _NOT_INSTALLED:
                continue
            target = package / source.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.suffix in (".py", ".pyi"):
                target.write_text(below_package(source.read_text(), str(source.relative_to(root))))
            else:
                target.write_bytes(source.read_bytes())


def below_package(source: str, path: str) -> str:
    """The source with ``from runtime.x import y`` as ``from podkeel.runtime.x import y``; all else stays as it is.

    Raises SyntaxError for imports that cannot be mapped by inserting the package's name.
    """
    lines = source.splitlines(keepends=True)
    for line, column in sorted(set(_places(source, path)), reverse=True):
        text = lines[line - 1]
        lines[line - 1] = f"{text[:column]}{PACKAGE}.{text[column:]}"
    return "".join(lines)


def _places(source: str, path: str) -> Iterator[tuple[int, int]]:
    """Line and column of each name of a room that is to follow the name of the package."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and _is_in_room(node.module or ""):
            word = _FROM.match(lines[node.lineno - 1], _column(lines, node))
            if word is None:
                raise SyntaxError(f"{path}:{node.lineno}: write `from` and the module in one line")
            yield node.lineno, word.end()
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if _is_in_room(alias.name):
                    if alias.asname is None:
                        raise SyntaxError(f"{path}:{node.lineno}: write `from … import …` or `import … as …`")
                    yield alias.lineno, _column(lines, alias)
        elif isinstance(node, ast.Call) and _called(node) == "BuildTopDescriptorsAndMessages":  # of generated stubs
            name = node.args[1]
            yield name.lineno, _column(lines, name) + 1
        elif isinstance(node, ast.Call) and _called(node) == "import_module":
            name = node.args[0]
            if isinstance(name, ast.Constant) and _is_in_room(str(name.value)):
                raise SyntaxError(f"{path}:{node.lineno}: name the module relative to __package__")


def _is_in_room(module: str) -> bool:
    return module.partition(".")[0] in ROOMS


def _called(node: ast.Call) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _column(lines: list[str], node: ast.stmt | ast.expr | ast.alias) -> int:
    """The column in characters: that of the syntax tree is in bytes."""
    return len(lines[node.lineno - 1].encode()[: node.col_offset].decode())
