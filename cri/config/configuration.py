"""The agent's configuration: ``config.toml``, then ``conf.d/*.toml`` beside it by name, then flags; the last one wins.

Every value keeps its source, so that ``podkeel config`` can print it and errors can name file, line and key.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import inspect

from cri.config.options import LogOptions, MetricsOptions, ServerOptions, StreamingOptions, TracingOptions
from cri.config.toml_lines import key_lines
from cri.config.value_checks import CHECKS
from host.errors import InvalidArgumentError
from images.options import ImageOptions
from network.options import NetworkOptions
from runtime.checkpoint.options import CheckpointOptions
from runtime.nri.options import NriOptions
from runtime.options import RuntimeOptions

DEFAULT_FILE = Path("/etc/podkeel/config.toml")

Key = tuple[str, ...]

# Each flag of ``podkeel serve`` and the key that it sets.
FLAGS: Mapping[str, Key] = {
    "--socket": ("server", "socket"),
    "--data-dir": ("runtime", "data_dir"),
    "--run-dir": ("runtime", "run_dir"),
    "--default-runtime": ("runtime", "default_runtime"),
    "--pod-cidr": ("network", "pod_cidrs"),
    "--bridge": ("network", "bridge"),
    "--registry-config-dir": ("images", "registry_config_dir"),
    "--stream-address": ("streaming", "address"),
    "--metrics-address": ("metrics", "address"),
    "--log-level": ("log", "level"),
}


class Configuration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All options of an agent; each field is the table of that name in the file."""

    server: ServerOptions = ServerOptions()
    runtime: RuntimeOptions = RuntimeOptions()
    network: NetworkOptions = NetworkOptions()
    images: ImageOptions = ImageOptions()
    nri: NriOptions = NriOptions()
    checkpoint: CheckpointOptions = CheckpointOptions()
    streaming: StreamingOptions = StreamingOptions()
    metrics: MetricsOptions = MetricsOptions()
    tracing: TracingOptions = TracingOptions()
    log: LogOptions = LogOptions()


@dataclass(frozen=True, slots=True)
class LoadedConfiguration:
    """The effective values, and the origin (``default``, ``FILE:LINE`` or a flag) of every value by its key."""

    configuration: Configuration
    origins: Mapping[Key, str]

    def values(self) -> Iterator[tuple[Key, object]]:
        """Every key with its plain value, in the order of the tables."""
        return _leaves(msgspec.to_builtins(self.configuration), Configuration)


def load(config_file: Path | None = None, flags: Mapping[str, object] | None = None) -> LoadedConfiguration:
    """Read the files; ``flags`` (by name, see FLAGS; None for those not given) replace their values.

    ``config_file`` None means DEFAULT_FILE, which may be missing. Raises InvalidArgumentError naming file, line and key
    of the first thing that is wrong.
    """
    values: dict[str, Any] = msgspec.to_builtins(Configuration())
    origins: dict[Key, str] = {}
    main = config_file if config_file is not None else DEFAULT_FILE
    files = [main] if config_file is not None or main.exists() else []
    files += sorted((main.parent / "conf.d").glob("*.toml"))
    for path in files:
        _Merge(_read(path), origins).run(values)
    for flag, value in (flags or {}).items():
        if value is not None:
            table, name = FLAGS[flag]
            _Merge(_Layer({table: {name: value}}, functools.partial(_flag_origin, flag)), origins).run(values)
    run_dir = ("runtime", "run_dir")
    if ("server", "socket") not in origins and run_dir in origins:
        values["server"]["socket"] = f"unix://{values['runtime']['run_dir'].rstrip('/')}/podkeel.sock"
        origins["server", "socket"] = f"runtime.run_dir, {origins[run_dir]}"
    _check_values(values, origins)
    configuration = msgspec.convert(values, Configuration)
    _check_default_runtime(configuration.runtime, origins)
    complete = {
        key: origins.get(key, "default") for key, _ in _leaves(msgspec.to_builtins(configuration), Configuration)
    }
    return LoadedConfiguration(configuration, complete)


@dataclass(frozen=True, slots=True)
class _Layer:
    """One source of values: their tree, and the name of the place of each key."""

    tree: dict[str, Any]
    origin: Callable[[Key], str]


def _flag_origin(flag: str, _key: Key) -> str:
    return flag


def _read(path: Path) -> _Layer:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidArgumentError(f"configuration file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"configuration file {path} is not UTF-8 text ({error})") from error
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgumentError(_syntax_error(path, text, str(error))) from error
    lines = key_lines(text)
    return _Layer(tree, lambda key: f"{path}:{lines.get(key, 1)}")


def _syntax_error(path: Path, text: str, message: str) -> str:
    place = re.search(r"\(at line (\d+), column \d+\)", message)
    line = int(place[1]) if place else text.rstrip().count("\n") + 1
    reason = re.sub(r" \(at (line \d+, column \d+|end of document)\)", "", message)
    return f"{path}:{line}: not valid TOML: {reason}"


class _Field(NamedTuple):
    """A key of a table: ``nested`` is the struct behind it if it is a table, or a table of such tables by name."""

    name: str
    kind: Any
    required: bool
    nested: type[msgspec.Struct] | None
    is_map: bool


@functools.cache  # msgspec evaluates every annotation each time it is asked
def _fields(struct: type[msgspec.Struct]) -> tuple[_Field, ...]:
    return tuple(
        _Field(field.encode_name, field.type, field.required, *_nested_struct(field.type))
        for field in msgspec.structs.fields(struct)
    )


class _Merge:
    """Checks each value of one source, replaces the earlier value with it, and records its origin."""

    def __init__(self, layer: _Layer, origins: dict[Key, str]) -> None:
        self._layer = layer
        self._origins = origins

    def run(self, values: dict[str, Any]) -> None:
        self._struct(values, self._layer.tree, Configuration, ())

    def _struct(self, values: dict[str, Any], tree: dict[str, Any], struct: type[msgspec.Struct], path: Key) -> None:
        fields = {field.name: field for field in _fields(struct)}
        for name, value in tree.items():
            key = (*path, name)
            if name not in fields:
                raise self._error(key, _unknown_key(key, tuple(fields)))
            field = fields[name]
            if field.nested is None:
                self._check_value(key, value, field.kind)
                values[name] = value
                self._origins[key] = self._layer.origin(key)
            elif field.is_map:
                self._map(values[name], self._table(key, value), field.nested, key)
            else:
                self._struct(values[name], self._table(key, value), field.nested, key)

    def _map(self, values: dict[str, Any], tree: dict[str, Any], struct: type[msgspec.Struct], path: Key) -> None:
        required = [field.name for field in _fields(struct) if field.required]
        for name, value in tree.items():
            key = (*path, name)
            entry = values.setdefault(name, {})
            self._struct(entry, self._table(key, value), struct, key)
            missing = [field for field in required if field not in entry]
            if missing:
                raise self._error(key, f"{', '.join(missing)} must be given")

    def _table(self, key: Key, value: object) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._error(key, f"expected a table, got {_shown(value)}")
        return value

    def _check_value(self, key: Key, value: object, kind: Any) -> None:
        try:
            msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            allowed = expected(inspect.type_info(kind))
            raise self._error(key, f"expected {allowed}, got {_shown(value)}") from error

    def _error(self, key: Key, message: str) -> InvalidArgumentError:
        return InvalidArgumentError(f"{self._layer.origin(key)}: {'.'.join(key)}: {message}")


def _nested_struct(kind: Any) -> tuple[type[msgspec.Struct] | None, bool]:
    """The struct behind a field that is a table, and whether it is a table of such tables by name."""
    info = _type_info(kind)
    if isinstance(info, inspect.StructType):
        return info.cls, False
    if isinstance(info, inspect.DictType) and isinstance(_plain(info.value_type), inspect.StructType):
        entry = _plain(info.value_type)
        assert isinstance(entry, inspect.StructType)
        return entry.cls, True
    return None, False


def _type_info(kind: Any) -> inspect.Type:
    return _plain(inspect.type_info(kind))


def _plain(info: inspect.Type) -> inspect.Type:
    return _plain(info.type) if isinstance(info, inspect.Metadata) else info


def _unknown_key(key: Key, known: tuple[str, ...]) -> str:
    where = f"in [{'.'.join(key[:-1])}]" if len(key) > 1 else "as a table"
    close = difflib.get_close_matches(key[-1], known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown key; {hint}allowed {where}: {', '.join(known)}"


def expected(info: inspect.Type) -> str:
    """What values a type allows, in words."""
    words = type(info).__name__.removesuffix("Type").lower()
    match info:
        case inspect.Metadata(type=inner, extra_json_schema=schema):
            words = str((schema or {}).get("description") or expected(inner))
        case inspect.BoolType():
            words = "true or false"
        case inspect.IntType(ge=low, le=high) | inspect.FloatType(ge=low, le=high):
            noun = "a whole number" if isinstance(info, inspect.IntType) else "a number"
            bounds = [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
            words = " ".join([noun, " and ".join(bounds)]).strip()
        case inspect.StrType():
            words = "a string"
        case inspect.LiteralType(values=values):
            words = "one of " + ", ".join(json.dumps(value) for value in values)
        case inspect.ListType(item_type=item) | inspect.VarTupleType(item_type=item):
            words = f"a list, each {expected(item)}"
        case inspect.SetType(item_type=item) | inspect.FrozenSetType(item_type=item):
            words = f"a list, each {expected(item)}"
        case inspect.DictType(value_type=item):
            words = f"a table, each value {expected(item)}"
        case inspect.UnionType(types=types):
            words = " or ".join(expected(one) for one in types if not isinstance(one, inspect.NoneType))
    return words


def _shown(value: object) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_values(values: Mapping[str, Any], origins: Mapping[Key, str]) -> None:
    for key, check in CHECKS.items():
        complaint = check(values[key[0]][key[1]])
        if complaint:
            raise InvalidArgumentError(f"{origins.get(key, 'default')}: {'.'.join(key)}: {complaint}")


def _check_default_runtime(runtime: RuntimeOptions, origins: Mapping[Key, str]) -> None:
    if runtime.default_runtime and runtime.default_runtime not in runtime.handlers:
        raise InvalidArgumentError(
            f"{origins['runtime', 'default_runtime']}: runtime.default_runtime: no handler is named "
            f"{runtime.default_runtime!r}; allowed: {', '.join(runtime.handlers)}, or your own one under "
            f"[runtime.handlers.{runtime.default_runtime}]"
        )


def _leaves(tree: dict[str, Any], struct: type[msgspec.Struct], path: Key = ()) -> Iterator[tuple[Key, object]]:
    for field in _fields(struct):
        key, value = (*path, field.name), tree[field.name]
        if field.nested is None:
            yield key, value
        elif field.is_map:
            for entry, fields in value.items():
                yield from _leaves(fields, field.nested, (*key, entry))
        else:
            yield from _leaves(value, field.nested, key)
