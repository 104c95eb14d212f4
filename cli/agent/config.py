"""``podkeel config``, and the configuration flags that ``serve``, ``check`` and ``reset`` share with it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from cri.config.configuration import FLAGS, Key, LoadedConfiguration, load

_COLUMN = 60


def load_for(options: argparse.Namespace) -> LoadedConfiguration:
    """The configuration that the flags in ``options`` ask for."""
    flags: dict[str, object] = {
        flag: getattr(options, flag.removeprefix("--").replace("-", "_"), None) for flag in FLAGS
    }
    if flags["--pod-cidr"] is not None:
        flags["--pod-cidr"] = [cidr.strip() for given in options.pod_cidr for cidr in given.split(",") if cidr.strip()]
    for flag in ("--data-dir", "--run-dir", "--registry-config-dir"):
        if flags[flag]:  # relative to the working directory of this command, not to that of the agent
            flags[flag] = str(Path(str(flags[flag])).absolute())
    return load(Path(file) if (file := getattr(options, "config", None)) else None, flags)


def config(options: argparse.Namespace) -> None:
    """Print every effective value and its source."""
    loaded = load_for(options)
    print(as_json(loaded) if options.format == "json" else as_toml(loaded))


def as_json(loaded: LoadedConfiguration) -> str:
    """The values as nested objects, and the origin of each by its dotted key."""
    import msgspec

    origins = {".".join(key): origin for key, origin in loaded.origins.items()}
    return json.dumps({"values": msgspec.to_builtins(loaded.configuration), "origins": origins}, indent=2)


def as_toml(loaded: LoadedConfiguration) -> str:
    """The values as TOML that ``--config`` accepts, with the origin of each as a comment."""
    tables: dict[Key, list[tuple[str, str]]] = {}
    for key, value in loaded.values():
        line = f"{_toml_key(key[-1])} = {toml_value(value)}" if value is not None else f"# {key[-1]} is not set"
        tables.setdefault(key[:-1], []).append((line, loaded.origins[key]))
    blocks: list[str] = []
    for table, lines in tables.items():
        width = max((len(line) for line, _ in lines if len(line) <= _COLUMN), default=0)
        body = [f"{line:<{width}}  # {origin}" for line, origin in lines]
        blocks.append("\n".join([f"[{'.'.join(map(_toml_key, table))}]", *body]))
    return "\n\n".join(blocks)


def toml_value(value: object) -> str:
    """One value as TOML writes it, on one line."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case Mapping():
            return "{" + ", ".join(f"{_toml_key(str(key))} = {toml_value(item)}" for key, item in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return str(value)


def _toml_key(key: str) -> str:
    bare = key.replace("-", "").replace("_", "")
    return key if bare.isascii() and bare.isalnum() else toml_value(key)
