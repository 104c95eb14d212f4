"""Every stage of every operation, read from the source code, so that tests also cover stages added later."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path(__file__).parents[2]

# The operations of each function that has stages.
_OPERATIONS = {
    ("runtime/pods/run.py", "_make"): ("RunPodSandbox",),
    ("runtime/pods/stop.py", "stop"): ("StopPodSandbox",),
    ("runtime/pods/stop.py", "tear_down"): ("StopPodSandbox",),
    ("runtime/pods/remove.py", "remove"): ("RemovePodSandbox",),
    ("runtime/pods/remove.py", "_record_removal"): ("RemovePodSandbox",),
    ("runtime/pods/remove.py", "finish_removal"): ("RemovePodSandbox",),
    ("runtime/containers/create.py", "_make_from"): ("CreateContainer",),
    ("runtime/containers/bundle/bundles.py", "_make_spec"): ("CreateContainer",),
    ("runtime/containers/remove.py", "_record_removal"): ("RemoveContainer",),
    ("runtime/containers/remove.py", "_finish_removal"): ("RemoveContainer",),
    ("runtime/containers/start.py", "_start"): ("StartContainer",),
    ("runtime/containers/start.py", "_write_start"): ("StartContainer",),
    ("runtime/containers/stop.py", "stop"): ("StopContainer",),
    ("runtime/containers/resources.py", "_change"): ("UpdateContainerResources",),
    ("runtime/checkpoints.py", "make_image"): ("ImageFromCheckpoint",),
    ("runtime/checkpoint/dump.py", "_checkpoint"): ("CheckpointContainer",),
    ("runtime/checkpoint/dump.py", "_save"): ("CheckpointContainer",),
    ("runtime/checkpoint/pod/save.py", "_checkpoint"): ("CheckpointPod",),
    ("runtime/checkpoint/pod/save.py", "_save"): ("CheckpointPod",),
    ("runtime/pods/restore.py", "restore"): ("RestorePod",),
    ("images/registry/resolve.py", "fetch"): ("PullImage",),
    ("images/puller.py", "import_archive"): ("ImportImage",),
    ("images/puller.py", "_install_layers"): ("PullImage", "ImportImage"),
    ("images/store.py", "_remove"): ("RemoveImage",),
}


def stages_in_source() -> Iterator[tuple[str, str, str]]:
    """File, function and name of each stage in the source code. A function inside another one belongs to that."""
    for room in ("runtime", "images", "network"):
        for path in sorted((_ROOT / room).rglob("*.py")):
            file = str(path.relative_to(_ROOT))
            functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.AsyncFunctionDef)]
            inner = {id(part) for function in functions for part in ast.walk(function) if part is not function}
            for function in functions:
                if id(function) not in inner:
                    yield from ((file, function.name, stage) for stage in _stages(function))


def _stages(function: ast.AsyncFunctionDef) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "stage":
            assert isinstance(node.args[0], ast.Constant), f"{function.name}: the stage's name must be a literal"
            yield str(node.args[0].value)


def stages_without_operation() -> list[tuple[str, str, str]]:
    """Stages in functions that are missing in this table. Add their operations to it."""
    return [found for found in stages_in_source() if found[:2] not in _OPERATIONS]


def operations_without_stages() -> set[tuple[str, str]]:
    """Functions of this table that have no stage. Remove them from it."""
    return _OPERATIONS.keys() - {found[:2] for found in stages_in_source()}


def points(*operations: str) -> list[str]:
    """``Operation.stage:when`` for the given operations (default: all).

    *When* is ``after`` for each stage and ``before`` for the first one of a function: after one is before the next. A
    stage that a function enters at two places is there once.
    """
    found = []
    before = ("", "")
    for file, function, stage in stages_in_source():
        for operation in _OPERATIONS.get((file, function), ()):
            if not operations or operation in operations:
                found += [f"{operation}.{stage}:before"] if (file, function) != before else []
                found.append(f"{operation}.{stage}:after")
        before = (file, function)
    return list(dict.fromkeys(found))
