"""CNI configurations, and plugins that are shell scripts controlled by a test."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ALL_VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")

_SCRIPT = """#!/bin/sh
calls={calls}
settings=$(cat)
number=$(ls "$calls" | wc -l)
printf '%s' "$settings" > "$calls/$(printf %04d "$number")-{name}-$CNI_COMMAND-$$"
echo "$CNI_CONTAINERID $CNI_NETNS $CNI_IFNAME $CNI_ARGS $CNI_PATH" > "$calls/.environment-$CNI_COMMAND"
case $CNI_COMMAND in
{cases}
esac
"""


def result(address: str = "10.206.0.2/24", version: str = "1.0.0") -> str:
    """The output of a script that reports an address."""
    return f'echo \'{{"cniVersion": "{version}", "ips": [{{"address": "{address}"}}]}}\''


def failure(code: int, text: str, details: str = "") -> str:
    """Shell lines that make a script fail with an error of the CNI specification."""
    body = json.dumps({"cniVersion": "1.0.0", "code": code, "msg": text, "details": details})
    return f"echo '{body}'; exit 1"


@dataclass
class Call:
    """One call of a scripted plugin."""

    plugin: str
    command: str
    settings: dict[str, Any]


@dataclass
class PluginFolders:
    """Folders of one test: for configurations, for plugins, and for records of their calls."""

    folder: Path

    def __post_init__(self) -> None:
        for folder in (self.configurations, self.programs, self.calls):
            folder.mkdir()

    @property
    def configurations(self) -> Path:
        return self.folder / "net.d"

    @property
    def programs(self) -> Path:
        return self.folder / "bin"

    @property
    def calls(self) -> Path:
        return self.folder / "calls"

    def configure(
        self, *plugins: dict[str, object], version: str = "1.0.0", name: str = "10-test.conflist", **more: Any
    ) -> Path:
        """Write a configuration to a new file, then rename it into place."""
        content = {"cniVersion": version, "name": "testnet", "plugins": plugins, **more}
        path = self.configurations / name
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps(content))
        return beside.rename(path)

    def script(self, name: str, *, versions: Sequence[str] = ALL_VERSIONS, **commands: str) -> dict[str, object]:
        """Make a plugin that runs these shell lines (default: ``true``). Returns its configuration."""
        told = json.dumps({"cniVersion": "1.0.0", "supportedVersions": list(versions)})
        lines = {"VERSION": f"echo '{told}'", "ADD": result(), **commands}
        cases = "\n".join(f"{name})\n{line}\n;;" for name, line in lines.items())
        path = self.programs / name
        beside = path.with_name(f".{name}")
        beside.write_text(_SCRIPT.format(calls=self.calls, name=name, cases=cases))
        beside.chmod(0o755)
        beside.rename(path)
        return {"type": name}

    def called(self, *commands: str) -> list[Call]:
        """The calls of scripted plugins so far, without VERSION. If ``commands`` are given, only those."""
        found = []
        for path in sorted(self.calls.iterdir()):
            if path.name.startswith("."):
                continue
            _, plugin, command_name, _ = path.name.split("-")
            if command_name in commands or (not commands and command_name != "VERSION"):
                found.append(Call(plugin, command_name, json.loads(path.read_text())))
        return found

    def environment(self, command_name: str) -> list[str]:
        """The environment of the last call of that command."""
        return (self.calls / f".environment-{command_name}").read_text().split()
