"""Reads and checks the files of network configurations of the Container Network Interface.

The format is section 1 of the CNI specification 1.1.0. A file with one plugin is read as a list of one. The plugins in
the folder beside the file that is named after the network are added, unless it sets ``loadOnlyInlinedPlugins``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from host import untrusted_json
from host.errors import InvalidArgumentError
from host.untrusted_json import JsonError

VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
SUFFIXES = (".conflist", ".conf", ".json")
PLUGIN_SUFFIX = ".conf"

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*")
_MAX_FILE_BYTES = 1024 * 1024


class Plugin(msgspec.Struct, frozen=True):
    """One plugin of a list: the name of its program, and its settings from the file."""

    type: str
    settings: dict[str, Any]

    @property
    def capabilities(self) -> frozenset[str]:
        """The capabilities that the plugin declares."""
        declared = self.settings.get("capabilities")
        return frozenset(name for name, wanted in declared.items() if wanted is True) if declared else frozenset()


class Configuration(msgspec.Struct, frozen=True):
    """A list of plugins that set up one network.

    Its plugins are called with ``version``. ``versions`` are the ones that it allows, the highest first.
    """

    name: str
    version: str
    versions: tuple[str, ...]
    plugins: tuple[Plugin, ...]
    path: str
    disable_check: bool = False
    disable_gc: bool = False

    @property
    def capabilities(self) -> frozenset[str]:
        """The capabilities that any of its plugins declares."""
        return frozenset().union(*(plugin.capabilities for plugin in self.plugins))

    def supports(self, version: str) -> bool:
        """Whether its plugins are called with ``version`` or a later one."""
        return VERSIONS.index(self.version) >= VERSIONS.index(version)

    @property
    def plugin_folder(self) -> Path:
        """The folder of further plugins of the network. It need not exist."""
        return Path(self.path).parent / self.name


def search_folder(folder: Path) -> tuple[Configuration | None, tuple[str, ...]]:
    """The configuration in the first valid file by name, and the errors of the files before it, which are skipped.

    An empty file is ignored: it is about to be written.
    """
    broken: list[str] = []
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    except (FileNotFoundError, NotADirectoryError):
        return None, ()
    except OSError as error:
        return None, (f"CNI configuration folder {folder} cannot be read: {error.strerror}",)
    for path in paths:
        try:
            if path.is_file() and (content := untrusted_json.read_file(path, _MAX_FILE_BYTES)).strip():
                return parse(content, path), tuple(broken)
        except OSError as error:
            broken.append(f"CNI configuration {path} cannot be read: {error.strerror}")
        except JsonError as error:
            broken.append(f"CNI configuration {path}: {error}")
        except InvalidArgumentError as error:
            broken.append(error.message)
    return None, tuple(broken)


def parse(content: bytes, path: Path) -> Configuration:
    """Parse a configuration from a file's content and the folder of plugins beside it.

    Raises InvalidArgumentError with the file and the error.
    """
    try:
        return _configuration(untrusted_json.decode(content, dict[str, Any], max_bytes=_MAX_FILE_BYTES), path)
    except JsonError as error:
        raise InvalidArgumentError(f"CNI configuration {path} is not a JSON object: {error}") from error
    except ValueError as error:
        raise InvalidArgumentError(f"CNI configuration {path}: {error}") from error


def _configuration(given: Mapping[str, Any], path: Path) -> Configuration:
    name = given.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"name {name!r} is no network name: use letters, digits and _ . -, a letter or digit first")
    versions = _versions(given)
    return Configuration(
        name=name,
        version=versions[0],
        versions=versions,
        plugins=_plugins(given, path.parent / name),
        path=str(path),
        disable_check=_flag(given, "disableCheck"),
        disable_gc=_flag(given, "disableGC"),
    )


def _plugins(given: Mapping[str, Any], folder: Path) -> tuple[Plugin, ...]:
    """The plugins of the file, then those of the folder by name."""
    if "type" in given and "plugins" not in given:
        return (_plugin(given),)
    listed = given.get("plugins", [])
    if not isinstance(listed, list):
        raise ValueError("plugins must be a list")
    plugins = [_plugin(settings) for settings in listed]
    if not _flag(given, "loadOnlyInlinedPlugins"):
        plugins += _plugins_in(folder)
    if not plugins:
        raise ValueError(f"plugins must be a list of at least one plugin, or {folder} must have one")
    return tuple(plugins)


def _plugins_in(folder: Path) -> list[Plugin]:
    """The plugins in the folder's files, one in each. A wrong file makes the whole network invalid."""
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == PLUGIN_SUFFIX)
    except (FileNotFoundError, NotADirectoryError):
        return []
    plugins: list[Plugin] = []
    for path in paths:
        try:
            content = untrusted_json.read_file(path, _MAX_FILE_BYTES)
            plugins.append(_plugin(untrusted_json.decode(content, object, max_bytes=_MAX_FILE_BYTES)))
        except (OSError, ValueError) as error:
            raise ValueError(f"its plugin {path}: {error}") from error
    return plugins


def _plugin(settings: object) -> Plugin:
    if not isinstance(settings, dict):
        raise ValueError(f"plugin {settings!r} is not an object")
    kind = settings.get("type")
    if not isinstance(kind, str) or not kind or "/" in kind or kind.startswith("."):
        raise ValueError(f"plugin type {kind!r} is no program's name")
    if not isinstance(settings.get("capabilities") or {}, dict):
        raise ValueError(f"capabilities of plugin {kind} must be an object")
    return Plugin(kind, settings)


def _versions(given: Mapping[str, Any]) -> tuple[str, ...]:
    """The versions that both the file and this agent support, the highest first."""
    listed = given.get("cniVersions") or []
    if not isinstance(listed, list):
        raise ValueError("cniVersions must be a list")
    asked = [*listed, given["cniVersion"]] if "cniVersion" in given else listed or ["0.2.0"]
    supported = tuple(version for version in reversed(VERSIONS) if version in asked)
    if not supported:
        raise ValueError(
            f"asks for CNI {', '.join(map(str, asked))}; supported are {VERSIONS[0]} to {VERSIONS[-1]}: set cniVersion"
        )
    return supported


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if value in (True, False):
        return bool(value)
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ValueError(f"{name} must be true or false, not {value!r}")
