"""OCI hooks of the node: files in folders, each with a hook and the conditions for its containers.

Follows oci-hooks(5), version 1.0.0. A file of a later folder replaces one with its name in an earlier one. An invalid
file is left out, and so is the one it replaces.

Patterns are RE2's, as with CRI-O and podman: matching takes time in proportion to the text, which the creator of a pod
chooses. A match with Python's patterns can take forever, and would block the agent.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Protocol

import msgspec

from host import untrusted_json
from runtime.specgen import config

MAX_FILES = 1024  # of one folder

_MAX_FILE_BYTES = 256 << 10
_STAGES = {
    "prestart": "prestart",
    "createRuntime": "create_runtime",
    "createContainer": "create_container",
    "startContainer": "start_container",
    "poststart": "poststart",
    "poststop": "poststop",
}
_log = logging.getLogger("podkeel.hooks")


class _Hook(msgspec.Struct, frozen=True):
    path: str
    args: list[str] = []
    env: list[str] = []
    timeout: Annotated[int, msgspec.Meta(gt=0, lt=1 << 31)] | None = None


class _When(msgspec.Struct, rename="camel", frozen=True, forbid_unknown_fields=True):
    always: bool | None = None
    annotations: dict[str, str] = {}
    commands: list[str] = []
    has_bind_mounts: bool | None = None


class _Pattern(Protocol):
    def search(self, text: str) -> object:
        """The match in the text; None if there is none."""


class _File(msgspec.Struct, frozen=True):
    version: Literal["1.0.0"]
    hook: _Hook
    when: _When
    stages: list[Literal["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"]]


@dataclass(frozen=True, slots=True)
class HookedContainer:
    """The values for conditions: annotations of container and pod, the first argument, whether there are mounts."""

    annotations: Mapping[str, str]
    command: str
    has_bind_mounts: bool


@dataclass(frozen=True, slots=True)
class _Rule:
    """One valid file, with its patterns compiled."""

    hook: config.Hook
    stages: Sequence[str]
    when: _When
    annotations: Sequence[tuple[_Pattern, _Pattern]]
    commands: Sequence[_Pattern]

    @property
    def on_the_node(self) -> bool:
        """Whether its program is on the node: a startContainer hook uses a program of the container."""
        return any(stage != "startContainer" for stage in self.stages)

    def matches(self, container: HookedContainer) -> bool:
        """Whether all conditions of the file are met."""
        when = self.when
        met = [
            any(key.search(name) and value.search(text) for name, text in container.annotations.items())
            for key, value in self.annotations
        ]
        if when.always is not None:
            met.append(when.always)
        if when.has_bind_mounts is not None:
            met.append(when.has_bind_mounts and container.has_bind_mounts)
        if self.commands:
            met.append(any(pattern.search(container.command) for pattern in self.commands))
        return bool(met) and all(met)


@dataclass(slots=True)
class HooksDir:
    """The hooks of ``folders``. Changed files are read again. Safe to use in several threads.

    ``problems`` has, for each invalid file, the reason why it was left out at the last reading.
    """

    folders: Sequence[str]
    problems: dict[str, str] = field(default_factory=dict)
    _known: dict[str, tuple[tuple[int, ...], _Rule | str]] = field(default_factory=dict)

    def add_to(self, spec: config.Spec, container: HookedContainer) -> None:
        """Add the hooks for ``container`` to its spec, in the order of their files' names. Blocks."""
        for rule in self.read():
            if rule.matches(container):
                if spec.hooks is None:
                    spec.hooks = config.Hooks()
                for stage in dict.fromkeys(rule.stages):
                    getattr(spec.hooks, _STAGES[stage]).append(rule.hook)

    def read(self) -> list[_Rule]:
        """All hooks, sorted by the names of their files. Blocks."""
        problems: dict[str, str] = {}
        files: dict[str, str] = {}
        for folder in self.folders:
            files |= _files_of(folder, problems)
        known: dict[str, tuple[tuple[int, ...], _Rule | str]] = {}
        rules = []
        for _, path in sorted(files.items(), key=lambda file: (file[0].lower(), file[0])):
            known[path] = self._rule(path)
            rule = known[path][1]
            if isinstance(rule, str):
                problems[path] = rule
            elif rule.on_the_node and not os.access(rule.hook.path, os.X_OK):
                problems[path] = f"its program {rule.hook.path} is missing, or not a program"
            else:
                rules.append(rule)
        for path, why in problems.items():
            if self.problems.get(path) != why:
                _log.warning("OCI hook %s: left out: %s", path, why)
        self._known, self.problems = known, problems
        return rules

    def _rule(self, path: str) -> tuple[tuple[int, ...], _Rule | str]:
        """The content of a file, or why it is invalid, and the attributes that show a change."""
        try:
            status = os.stat(path)  # noqa: PTH116 - takes a third of pathlib's time
            version = (status.st_ino, status.st_dev, status.st_mtime_ns, status.st_ctime_ns, status.st_size)
            known = self._known.get(path)
            if known is not None and known[0] == version:
                return known
            return version, read_rule(Path(path))
        except (OSError, ValueError) as error:  # JsonError and errors of patterns are ValueErrors
            return (), str(error)


def _files_of(folder: str, problems: dict[str, str]) -> dict[str, str]:
    """Paths by name. A missing folder has no hooks."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.name.endswith(".json"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        problems[folder] = str(error)
        return {}
    if len(names) > MAX_FILES:
        problems[folder] = f"it has {len(names)} files: those after the first {MAX_FILES} are left out"
    return {name: f"{folder}/{name}" for name in names[:MAX_FILES]}


def read_rule(path: Path) -> _Rule:
    """The hook and the conditions in a file. Raises OSError, JsonError and ValueError for an invalid file."""
    file = untrusted_json.decode(untrusted_json.read_file(path, _MAX_FILE_BYTES), _File)
    hook, when = file.hook, file.when
    if any("\0" in text for text in (hook.path, *hook.args, *hook.env)):
        raise ValueError("hook has a NUL byte in its path, args or env")
    if not hook.path.startswith("/"):
        raise ValueError(f"hook.path {hook.path!r} is not absolute")
    if not file.stages:
        raise ValueError("stages is empty")
    if when == _When():
        raise ValueError("when has no condition: use always, annotations, commands or hasBindMounts")
    return _Rule(
        hook=config.Hook(path=hook.path, args=hook.args, env=hook.env, timeout=hook.timeout),
        stages=file.stages,
        when=when,
        annotations=[(_pattern(key), _pattern(value)) for key, value in when.annotations.items()],
        commands=_patterns(when.commands),
    )


def _patterns(patterns: Iterable[str]) -> list[_Pattern]:
    return [_pattern(pattern) for pattern in patterns]


def _pattern(pattern: str) -> _Pattern:
    import re2  # only few nodes need it

    options = re2.Options()
    options.log_errors = False  # to standard error
    try:
        compiled: _Pattern = re2.compile(pattern, options)
    except re2.error as error:
        why = error.args[0].decode(errors="replace") if error.args else ""
        raise ValueError(f"{pattern!r} is not a regular expression: {why}") from error
    return compiled
