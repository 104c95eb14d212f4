"""docs/configuration.md has every key with its default, and the flags that set keys."""

from __future__ import annotations

import re
from pathlib import Path

from cli.agent.config import toml_value
from cri.config.configuration import FLAGS, load

DOCUMENT = Path(__file__).parents[3] / "docs/configuration.md"


def documented() -> dict[str, str]:
    """The default of each key in the tables of the document, as written there."""
    found: dict[str, str] = {}
    table = ""
    for line in DOCUMENT.read_text().splitlines():
        if heading := re.fullmatch(r"### `\[(.+)\]`", line):
            table = heading[1]
        elif table and (row := re.match(r"\| `(\w+)` \| (`(.*?)`)? ?\|", line)):
            found[f"{table}.{row[1]}"] = row[3] or ""
    return found


def test_every_key_is_documented_with_its_default(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[runtime.handlers.NAME]\npath = ''\n")
    values = load(tmp_path / "config.toml").values()
    defaults = {".".join(key): toml_value(value) for key, value in values if key[2:3] not in (("crun",), ("runc",))}
    assert documented() == defaults | {"runtime.handlers.NAME.path": ""}


def test_every_flag_is_documented() -> None:
    rows = dict(re.findall(r"\| `(--[\w-]+) [^`]*` \| `([\w.]+)`", DOCUMENT.read_text()))
    assert rows == {flag: ".".join(key) for flag, key in FLAGS.items()}
